//go:build linux

package main

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/copilot/pki"
	"github.com/ctrlplane/pilot/internal/commandline"
)

var nodeCACommand = &cli.Command{
	Name:  "node-ca",
	Usage: "create a CA with which copilot renews nodes' certificates by itself",
	Description: `Creates node-ca.pem and node-ca-key.pem, and adds the CA to ca.pem, so that copilot
accepts its clients. The key belongs to user copilot if there is one. ca.pem's
own key is not needed. With node-ca and node-ca-key in copilot.toml, copilot then
renews the certificate of each node that still has a valid one.

Run again, it replaces that CA. Once each node has a certificate of the new one,
--finish removes the old CA from both files.

Example:
   copilot certs node-ca`,
	Flags: []cli.Flag{
		configDirFlag(),
		&cli.GenericFlag{Name: "for", Usage: "how long the CA's certificate is valid: a `TIME`, as in 3650d, or a date", Value: commandline.After(caFor)},
		&cli.BoolFlag{Name: "finish", Usage: "remove the CA for nodes that was replaced"},
	},
	Action: certsNodeCA,
}

func certsNodeCA(_ context.Context, c *cli.Command) error {
	if err := noArguments(c); err != nil {
		return err
	}
	dir, err := filepath.Abs(c.String("config-dir"))
	if err != nil {
		return err
	}
	if c.Bool("finish") {
		n, err := pki.DropOldNodeCAs(dir)
		if err != nil {
			return fmt.Errorf("certs node-ca: %w", err)
		}
		if n == 0 {
			fmt.Printf("%s has no old CA for nodes\n", filepath.Join(dir, pki.CertFile))
			return nil
		}
		fmt.Printf("removed the old CA for nodes from %s and %s\n", filepath.Join(dir, pki.CertFile), filepath.Join(dir, pki.NodeCertFile))
		return nil
	}
	valid, err := until(c, "for")
	if err != nil {
		return err
	}
	if err := makeNodeCA(dir, valid); err != nil {
		return fmt.Errorf("certs node-ca: %w", err)
	}
	fmt.Printf(`%s is ready, and %s has it.

   1. copy %[2]s to other brokers, if there are any, as their tls-client-ca
   2. in copilot.toml:
%[3]s   3. systemctl restart copilot
`, filepath.Join(dir, pki.NodeCertFile), filepath.Join(dir, pki.CertFile), nodeCAText(dir, "      "))
	return nil
}

// makeNodeCA creates a CA for nodes in dir, whose key belongs to the server's user.
func makeNodeCA(dir string, valid time.Duration) error {
	return pki.RotateNodeCA(dir, valid, giveToService)
}

// nodeCAText returns the settings in copilot.toml of the CA for nodes in dir.
func nodeCAText(dir, indent string) string {
	return fmt.Sprintf("%[1]snode-ca = %[2]q\n%[1]snode-ca-key = %[3]q\n", indent, filepath.Join(dir, pki.NodeCertFile), filepath.Join(dir, pki.NodeKeyFile))
}
