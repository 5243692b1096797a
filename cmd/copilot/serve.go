//go:build linux

package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/internal/tracing"
)

var serveCommand = &cli.Command{
	Name:  "serve",
	Usage: "answer requests for KEKs",
	Description: `Answers pilot, and the original pilot, until it gets SIGTERM. It reloads its policy
when the file changes, and on SIGHUP, which also reopens its audit log.

Example:
   copilot serve --listen unix:///run/copilot/copilot.sock`,
	Flags: configFlags(
		&cli.StringSliceFlag{Name: "listen", Usage: "`ADDRESS` to listen on: unix:///PATH or HOST:PORT; may be repeated", DefaultText: defaultListen},
		&cli.StringFlag{Name: "tls-cert", Usage: "the server's certificate, `FILE` in PEM"},
		&cli.StringFlag{Name: "tls-key", Usage: "private key of --tls-cert, `FILE` in PEM"},
		&cli.StringFlag{Name: "tls-client-ca", Usage: "CA of client certificates, `FILE` in PEM"},
		&cli.BoolFlag{Name: "insecure-loopback", Usage: "listen on a loopback address without TLS, so that every user of this machine can read every KEK"},
		&cli.StringFlag{Name: "metrics-listen", Usage: "`HOST:PORT` for metrics, health and readiness, in plain HTTP"},
	),
	Action: func(ctx context.Context, c *cli.Command) error {
		if err := noArguments(c); err != nil {
			return err
		}
		conf, err := configuration(c)
		if err != nil {
			return err
		}
		if len(conf.Listen) == 0 {
			conf.Listen = []string{defaultListen}
		}
		stopTracing, err := tracing.Start(ctx, "copilot")
		if err != nil {
			return err
		}
		defer func() {
			if err := stopTracing(context.WithoutCancel(ctx)); err != nil {
				logrus.WithError(err).Warn("can't send the last traces")
			}
		}()
		ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
		defer stop()
		return server.Serve(ctx, conf)
	},
}
