package main

import (
	"context"
	"fmt"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/internal/commandline"
	"github.com/ctrlplane/pilot/internal/exit"
)

var publicCommand = &cli.Command{
	Name: "public", Usage: "print the public half of a KEK, to encrypt without a broker", ArgsUsage: "ID",
	Description: `Prints a text file for machines that encrypt and have no access to the broker, such as
"ctr-pilot images encrypt --recipient hpke:team-a.pub". It is signed, and no secret. It
is for the KEK's current version. What is encrypted with it can't be taken back by
"copilot keys revoke", and can't be decrypted once that version is destroyed.

With --server, it takes the right "public" or "admin".

Example:
   copilot keys public team-a > team-a.pub`,
	Flags: keysFlags(
		&cli.GenericFlag{Name: "for", Usage: "how long the file is valid: a `TIME`, as in 30d, or a date", Value: &commandline.When{},
			DefaultText: "90d, or as long as the certificate that signs it"},
	),
	Action: onKEK(func(ctx context.Context, c *cli.Command, keys server.Keys, id string) error {
		valid := time.Duration(0)
		if c.IsSet("for") {
			var err error
			if valid, err = until(c, "for"); err != nil {
				return err
			}
			if valid < time.Second {
				return exit.Usagef("--for is not a time of at least a second")
			}
		}
		key, err := keys.Public(ctx, id, valid)
		if err != nil {
			return err
		}
		if c.Bool("json") {
			return printJSON(key)
		}
		fmt.Print(key.File)
		return nil
	}),
}
