//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/copilot/pki"
	"github.com/ctrlplane/pilot/internal/commandline"
	"github.com/ctrlplane/pilot/internal/exit"
)

var serverCACommand = &cli.Command{
	Name:  "server-ca",
	Usage: "create a CA with which copilot issues its own certificates",
	Description: `Creates server-ca.pem and server-ca-key.pem. As tls-cert and tls-key in
copilot.toml, copilot issues its server's certificates with them and renews those by
itself. The CA can issue certificates for these hosts only, and none for clients.

If there is a ca.pem, the CA is added to it: nodes need it as their broker-ca, and pilot
reloaded, before copilot uses the CA. Without one, server-ca.pem is their broker-ca.

Example:
   copilot certs server-ca --host copilot.example.com`,
	Flags: []cli.Flag{
		configDirFlag(),
		&cli.StringSliceFlag{Name: "host", Usage: "`NAME` or address that nodes connect to; may be repeated", Required: true},
		&cli.GenericFlag{Name: "for", Usage: "how long the CA's certificate is valid: a `TIME`, as in 3650d, or a date", Value: commandline.After(caFor)},
	},
	Action: certsServerCA,
}

func certsServerCA(_ context.Context, c *cli.Command) error {
	if err := noArguments(c); err != nil {
		return err
	}
	hosts := c.StringSlice("host")
	if err := checkHosts(hosts); err != nil {
		return exit.Usagef("certs server-ca: %w", err)
	}
	valid, err := until(c, "for")
	if err != nil {
		return err
	}
	dir, err := filepath.Abs(c.String("config-dir"))
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := pki.CreateServerCA(dir, hosts, valid, giveToService); err != nil {
		return fmt.Errorf("certs server-ca: %w", err)
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	trust := in(pki.ServerCACertFile)
	if _, err := os.Stat(in(pki.CertFile)); err == nil {
		trust = in(pki.CertFile)
	}
	fmt.Printf(`%[1]s is ready.

   1. copy %[2]s to every node, as its broker-ca, and run "systemctl reload pilot" there
   2. in copilot.toml:
      tls-cert = %[1]q
      tls-key = %[3]q
   3. systemctl restart copilot
`, in(pki.ServerCACertFile), trust, in(pki.ServerCAKeyFile))
	return nil
}
