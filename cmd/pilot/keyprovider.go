package main

import (
	"context"
	"errors"
	"os"

	keyproviderconfig "github.com/containers/ocicrypt/config/keyprovider-config"
	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/keyprovider"
	"github.com/ctrlplane/pilot/processor"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
	"github.com/ctrlplane/pilot/processor/ocicryptclient/grpcdial"
)

var keyproviderCommand = &cli.Command{
	Name:  "keyprovider",
	Usage: "answer one request on standard input, as an ocicrypt key provider executable",
	Description: `Reads one request of ocicrypt's key provider protocol from standard input and
writes the answer to standard output. It asks the broker itself, or with
--daemon a running "pilot serve", which has the KEKs cached.

Example, a file that OCICRYPT_KEYPROVIDER_CONFIG names:
   {"key-providers": {"pilot": {"cmd": {"path": "/usr/local/bin/pilot",
      "args": ["keyprovider", "--broker", "unix:///run/copilot/copilot.sock"]}}}}`,
	Flags: append(configFlags(append(brokerSettings, "provider-name", "annotation-format", "default-keks", "kbs-keks", "public-keys", "public-keys-ca", "age-identities", "log-level")...),
		&cli.StringFlag{Name: "daemon", Usage: "unix socket of a running pilot serve to go through, as unix:///`PATH`"}),
	Action: func(ctx context.Context, c *cli.Command) error {
		if c.NArg() > 0 {
			return exit.Usagef("keyprovider takes no argument, and got %q", c.Args().First())
		}
		conf, err := loadConfiguration(c)
		if err != nil {
			return err
		}
		// Only the error is printed, once.
		if logrus.GetLevel() == logrus.InfoLevel {
			logrus.SetLevel(logrus.WarnLevel)
		}
		if daemon := c.String("daemon"); daemon != "" {
			return denied(forward(ctx, address(daemon)))
		}
		var broker keyprovider.Broker
		if len(conf.Broker) > 0 {
			if broker, err = conf.Client(); err != nil {
				return err
			}
		}
		provider := conf.provider(broker, nil)
		service := keyprovider.Service{Provider: provider, Names: conf.ProviderName, CoCo: keyprovider.CoCo(func() *keyprovider.Provider { return provider })}
		return denied(service.Exec(ctx, os.Stdin, os.Stdout))
	},
}

// denied sets the exit status of an error by which a working broker denies the request.
// If the broker could not decide about one of several KEKs, it remains a failure.
func denied(err error) error {
	switch {
	case err == nil, errors.Is(err, client.ErrUnavailable), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, client.ErrForbidden), errors.Is(err, client.ErrNotFound), errors.Is(err, processor.ErrDenied):
		return exit.DeniedError(err)
	}
	return err
}

func forward(ctx context.Context, daemon address) error {
	if path, ok := daemon.unix(); !ok || path == "" {
		return exit.Usagef("--daemon %q is not a unix socket, as in unix:///run/pilot/keyprovider.sock", daemon)
	}
	provider, err := ocicryptclient.New("", keyproviderconfig.KeyProviderAttrs{Grpc: string(daemon)}, grpcdial.Call)
	if err != nil {
		return exit.Usagef("--daemon: %w", err)
	}
	return keyprovider.Forward(ctx, provider, os.Stdin, os.Stdout)
}
