//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v3"

	brokerclient "github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/exit"
)

var renewCommand = &cli.Command{
	Name:  "renew",
	Usage: "have copilot renew this machine's broker-cert",
	Description: `Creates a new private key, has copilot issue a certificate for it with the name of
the current one, which must still be valid, and replaces both files. They keep
their owner and mode, and pilot uses them for its next connection. copilot must
be configured for this: see "Renew by themselves" in docs/copilot.md.

pilot serve does this by itself when a third of the certificate's lifetime is left.

Example:
   pilot node renew`,
	Flags:  configFlags(brokerSettings...),
	Action: renew,
}

func renew(ctx context.Context, c *cli.Command) error {
	if err := nodeArguments(c); err != nil {
		return err
	}
	conf, err := loadConfiguration(c)
	if err != nil {
		return err
	}
	if conf.BrokerCert == "" {
		return exit.Usagef("broker-cert is not set, so there is no certificate to renew")
	}
	client, err := conf.Client()
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	cert, err := client.RenewCertificate(ctx)
	if err != nil {
		return fmt.Errorf("%w%s", err, remedy(err, conf))
	}
	var names []string
	for _, u := range cert.URIs {
		names = append(names, u.String())
	}
	fmt.Printf("%s: %s, valid until %s\n", conf.BrokerCert, strings.Join(names, ", "), cert.NotAfter.UTC().Format(time.RFC3339))
	return nil
}

// remedy returns how else to renew a certificate, or "".
func remedy(err error, conf configuration) string {
	if errors.Is(err, brokerclient.ErrCertExpired) {
		return fmt.Sprintf(": the expired certificate can't authenticate its own renewal. On the broker's machine run \"copilot certs renew\" with a copy of %s, and copy the result back: the key stays here", conf.BrokerCert)
	}
	return ""
}
