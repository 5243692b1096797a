package main

import (
	"fmt"
	"os"

	"filippo.io/age"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/copilot/backup"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/regular"
)

// openFlags are those of commands that open a backup.
func openFlags(more ...cli.Flag) []cli.Flag {
	return append([]cli.Flag{
		&cli.StringSliceFlag{Name: "identity", Usage: "`FILE` with the age or SSH private key of a recipient; may be repeated"},
		&cli.StringSliceFlag{Name: "share", Usage: "`FILE` with a share of \"copilot backup shares\"; repeated for each"},
	}, more...)
}

// sealed returns the backup that is the command's argument, and what opens it. The caller
// closes it.
func sealed(c *cli.Command) (*os.File, []age.Identity, error) {
	if c.NArg() != 1 {
		return nil, nil, exit.Usagef("%s takes the FILE of a backup, and got %d arguments", c.Name, c.NArg())
	}
	return sealedIn(c, c.Args().First())
}

// sealedIn is [sealed] for the backup in a file.
func sealedIn(c *cli.Command, name string) (*os.File, []age.Identity, error) {
	identities, err := identitiesOf(c)
	if err != nil {
		return nil, nil, err
	}
	f, err := regular.Open(name)
	return f, identities, err
}

func identitiesOf(c *cli.Command) (list []age.Identity, err error) {
	for _, name := range c.StringSlice("identity") {
		ids, err := backup.ReadIdentities(name)
		if err != nil {
			return nil, err
		}
		list = append(list, ids...)
	}
	var shares []backup.Share
	for _, name := range c.StringSlice("share") {
		text, err := regular.ReadText(name, maxKeyFile)
		if err != nil {
			return nil, err
		}
		s, err := backup.ParseShare(string(text))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		shares = append(shares, s)
	}
	if len(shares) > 0 {
		id, err := backup.Combine(shares)
		if err != nil {
			return nil, err
		}
		list = append(list, id)
	}
	if len(list) == 0 {
		return nil, exit.Usagef("name what opens it: --identity FILE, or --share FILE for each share")
	}
	return list, nil
}
