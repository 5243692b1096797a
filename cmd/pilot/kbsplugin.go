package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"

	sdnotify "github.com/coreos/go-systemd/v22/daemon"
	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v3"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/loopback"
	"github.com/ctrlplane/pilot/internal/tracing"
	"github.com/ctrlplane/pilot/keyprovider/kbsplugin"
)

const pluginListen = "plugin-listen"

var kbsPluginCommand = &cli.Command{
	Name:  "kbs-plugin",
	Usage: "give KEKs to the Key Broker Service of Confidential Containers",
	Description: `Runs beside a KBS (Trustee), in its pod, as a backend named copilot of its plugin
for external programs. A guest that the KBS has attested gets the version of a KEK that
kbs+external:///copilot/KEK/VERSION names, if copilot's policy lets this program's
identity export it.

The KBS shows no credentials: every process that can connect to the address gets those
KEKs too. So it is a loopback address, of a pod that runs nothing else.

Example, with this in the KBS's configuration:
   [[plugins]]
   name = "external"
   backends = [{ name = "copilot", endpoint = "http://127.0.0.1:50051" }]

   pilot kbs-plugin --broker https://copilot.example.com:8443 --broker-ca ca.pem \
      --broker-cert kbs.pem --broker-key kbs-key.pem`,
	Flags: append(configFlags(append(brokerSettings, "log-level")...),
		&cli.StringFlag{Name: pluginListen, Value: "127.0.0.1:50051", Usage: "loopback `ADDRESS` for the KBS, as 127.0.0.1:PORT"}),
	Action: serveKBSPlugin,
}

func serveKBSPlugin(ctx context.Context, c *cli.Command) error {
	if c.NArg() > 0 {
		return exit.Usagef("kbs-plugin takes no argument, and got %q", c.Args().First())
	}
	address := c.String(pluginListen)
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return exit.Usagef("--%s %q is not HOST:PORT, as in 127.0.0.1:50051", pluginListen, address)
	}
	if !loopback.Is(host) {
		return exit.Usagef("--%s %s: other machines could get KEKs there, since a KBS shows no credentials: run this in the pod of the KBS, on a loopback address", pluginListen, address)
	}
	conf, err := loadConfiguration(c)
	if err != nil {
		return err
	}
	broker, err := conf.Client()
	if err != nil {
		return err
	}
	if broker.Original() {
		return exit.Usagef("broker: kbs-plugin gives out versions of KEKs, and a broker with the original's API has none")
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("%s: %w", pluginListen, err)
	}
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	g, ctx := errgroup.WithContext(ctx)
	serveUntilDone(ctx, g, kbsplugin.NewServer(broker, grpc.ConnectionTimeout(connectTimeout), grpc.UnaryInterceptor(tracing.UnaryServer())), l)
	logrus.WithFields(logrus.Fields{"listen": l.Addr(), "broker": conf.Broker.String()}).Info("pilot gives KEKs to a KBS")
	if _, err := sdnotify.SdNotify(false, sdnotify.SdNotifyReady); err != nil {
		logrus.WithError(err).Warn("can't notify systemd that pilot is ready")
	}
	return g.Wait()
}
