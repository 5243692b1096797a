// Command copilot is the key broker: it keeps KEKs and hands them to pilot.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/ctrlplane/pilot/copilot"
	"github.com/ctrlplane/pilot/coredump"
	"github.com/ctrlplane/pilot/version"
)

func main() {
	os.Exit(run())
}

// run runs the command line and returns the exit status.
func run() int {
	if err := coredump.Disable(); err != nil {
		fmt.Fprintf(os.Stderr, "copilot: core dumps can't be disabled: %s\n", err)
		return 1
	}
	app := &cli.App{
		Name:                 "copilot",
		Usage:                "keep key encryption keys (KEKs) and hand them to pilot",
		Version:              version.Version,
		Commands:             []*cli.Command{serveCommand, keysCommand},
		EnableBashCompletion: true,
		ExitErrHandler:       func(*cli.Context, error) {},
	}
	if err := app.Run(os.Args); err != nil {
		fmt.Fprintf(os.Stderr, "copilot: %s\n", err)
		return 1
	}
	return 0
}

// dirFlag is the flag of each command that needs the store.
func dirFlag() cli.Flag {
	return &cli.StringFlag{Name: "dir", Usage: "`DIRECTORY` of the store", Value: "/var/lib/copilot", EnvVars: []string{"COPILOT_DIR"}}
}

func auditLogFlag() cli.Flag {
	return &cli.StringFlag{Name: "audit-log", Usage: "`FILE` to write the audit log to, or - for standard output (default: audit.log in --dir)"}
}

var serveCommand = &cli.Command{
	Name:  "serve",
	Usage: "answer requests for KEKs",
	Description: `Answers pilot, and the original pilot, until it is told to stop.

Example:
   copilot serve --listen unix:///run/copilot/copilot.sock`,
	Flags: []cli.Flag{
		dirFlag(),
		&cli.StringSliceFlag{Name: "listen", Usage: "where to answer: unix:///PATH (mode 0600) or HOST:PORT; may be repeated", Value: cli.NewStringSlice("unix:///run/copilot/copilot.sock")},
		&cli.StringFlag{Name: "tls-cert", Usage: "certificate to answer TLS with, `FILE` in PEM"},
		&cli.StringFlag{Name: "tls-key", Usage: "private key of --tls-cert, `FILE` in PEM"},
		&cli.StringFlag{Name: "tls-client-ca", Usage: "CA of the clients that may ask, `FILE` in PEM"},
		&cli.BoolFlag{Name: "insecure-loopback", Usage: "answer on a loopback address without TLS, so that every user of this machine gets every KEK"},
		auditLogFlag(),
	},
	Action: func(c *cli.Context) error {
		if err := noArguments(c); err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(c.Context, os.Interrupt, syscall.SIGTERM)
		defer stop()
		return copilot.Serve(ctx, copilot.Config{
			Dir:              c.String("dir"),
			Listen:           c.StringSlice("listen"),
			TLSCert:          c.String("tls-cert"),
			TLSKey:           c.String("tls-key"),
			TLSClientCA:      c.String("tls-client-ca"),
			InsecureLoopback: c.Bool("insecure-loopback"),
			AuditLog:         c.String("audit-log"),
		})
	},
}

func noArguments(c *cli.Context) error {
	if c.NArg() > 0 {
		return fmt.Errorf("%s takes no argument, and got %q", c.Command.Name, c.Args().First())
	}
	return nil
}
