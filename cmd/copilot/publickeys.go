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

var publicKeysCommand = &cli.Command{
	Name:  "public-keys",
	Usage: "issue the certificate that signs the public halves of KEKs",
	Description: `Writes public-keys.pem and public-keys-key.pem, which belongs to user copilot if there
is one. With public-keys-cert and public-keys-key in copilot.toml, "copilot keys
public" gives out public halves of KEKs, signed with it. Those who encrypt know the CA
in ca.pem, and take no other signature. "copilot init" has issued it already, and
"copilot certs renew" renews it.

Example:
   copilot certs public-keys`,
	Flags: []cli.Flag{
		configDirFlag(),
		&cli.GenericFlag{Name: "for", Usage: "how long the certificate is valid: a `TIME`, as in 365d, or a date", Value: commandline.After(serverFor)},
	},
	Action: func(_ context.Context, c *cli.Command) error {
		if err := noArguments(c); err != nil {
			return err
		}
		valid, err := until(c, "for")
		if err != nil {
			return err
		}
		dir, err := filepath.Abs(c.String("config-dir"))
		if err != nil {
			return err
		}
		ca, err := pki.Load(dir)
		if err == nil {
			err = makeSigner(ca, dir, valid)
		}
		if err != nil {
			return fmt.Errorf("certs public-keys: %w", err)
		}
		fmt.Printf(`%s is ready.

   1. in copilot.toml:
      public-keys-cert = %[1]q
      public-keys-key = %[2]q
   2. systemctl restart copilot
   3. copilot keys public team-a > team-a.pub
`, filepath.Join(dir, pki.SignerCertFile), filepath.Join(dir, pki.SignerKeyFile))
		return nil
	},
}

// makeSigner issues the certificate that signs public halves of KEKs, whose key belongs to
// the server's user.
func makeSigner(ca *pki.CA, dir string, valid time.Duration) error {
	return ca.IssueSigner(dir, valid, giveToService)
}
