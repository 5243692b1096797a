//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/internal/exit"
)

var masterCommand = &cli.Command{
	Name:  "master",
	Usage: "move and rotate the master key, which seals copilot's store",
	Description: `The master key is a file in --dir, or a KMS or TPM that [master-key] in copilot.toml
names has wrapped it.

Example:
   copilot master status`,
	Commands: []*cli.Command{{
		Name: "status", Usage: "show where the master key is, and what it seals",
		Description: `Reads all records, and reports how many each master key seals. There are two during
a rotation.

Example:
   copilot master status`,
		Flags:  configFlags(jsonFlag()),
		Action: masterStatus,
	}, {
		Name: "move", Usage: "move the master key to the KMS or TPM that copilot.toml names",
		Description: `Has the key that [master-key] in copilot.toml names wrap the master key, and keeps the
result in the store. It finds the master key in the file master.key, in the
credential, or in another of [backends]. After it has read the master key back from
there, it removes the file. Stop copilot first. With several copilots on a database,
run it for each. It can be run again after it was interrupted.

With --to-file, it writes the master key to the file master.key instead. Then remove
[master-key] from copilot.toml.

Example:
   systemctl stop copilot
   runuser -u copilot -- copilot master move
   systemctl start copilot`,
		Flags: configFlags(
			&cli.BoolFlag{Name: "to-file", Usage: "move it to the file master.key in --dir"},
			jsonFlag(),
		),
		Action: masterMove,
	}, {
		Name: "rotate", Usage: "make a new master key, and seal everything under it again",
		Description: `Works while copilot runs, also with several copilots on a database, and goes on if it is
interrupted. KEKs do not change, nor do images. The old master key is dropped once
nothing is sealed under it and all copilots have the new one.

Every copilot on the database has to know master keys first: update all of them
before the first rotation.

Example:
   copilot master rotate`,
		Flags:  configFlags(jsonFlag()),
		Action: masterRotate,
	}, {
		Name: "forget", Usage: "forget a copilot or KMS that no longer has the master key", ArgsUsage: "HOLDER",
		Description: `A rotation waits until each holder of the master key has the new one: a KMS, as
BACKEND/PATH, or a copilot with a file, as HOST:DIRECTORY. "copilot master status"
lists them. Forget one that is gone for good: it can't open the store any more once
the master key was rotated.

Example:
   copilot master forget old-host:/var/lib/copilot`,
		Flags:  configFlags(jsonFlag()),
		Action: masterForget,
	}},
}

// masterAction runs a command of copilot master, and prints what it returns as JSON if that
// is asked for.
func masterAction[T any](ctx context.Context, c *cli.Command, do func(context.Context, server.Config) (T, error), print func(T)) error {
	conf, err := configuration(c)
	if err != nil {
		return err
	}
	out, err := do(ctx, conf)
	if err != nil {
		return fmt.Errorf("master %s: %w", c.Name, withStatus(asOwner(err)))
	}
	if c.Bool("json") {
		return printJSON(out)
	}
	print(out)
	return nil
}

func masterStatus(ctx context.Context, c *cli.Command) error {
	if err := noArguments(c); err != nil {
		return err
	}
	return masterAction(ctx, c, server.MasterStatus, func(s keystore.MasterStatus) {
		fmt.Printf("master key %d, from %s\n", s.Current, s.Source)
		for _, k := range s.Keys {
			made := ""
			if !k.Created.IsZero() {
				made = ", made " + k.Created.Format(time.RFC3339)
			}
			fmt.Printf("   %d: seals %d KEKs%s%s\n", k.Version, k.Records, made, holders(", held by ", k.Holders))
		}
		if s.Rotating {
			fmt.Printf("being rotated%s\n", holders(", waits for ", s.Waiting))
		}
		for _, id := range s.Damaged {
			fmt.Printf("DAMAGED: KEK %s\n", id)
		}
	})
}

func holders(what string, names []string) string {
	if len(names) == 0 {
		return ""
	}
	return what + strings.Join(names, ", ")
}

func masterMove(ctx context.Context, c *cli.Command) error {
	if err := noArguments(c); err != nil {
		return err
	}
	return masterAction(ctx, c, func(ctx context.Context, conf server.Config) (keystore.Moved, error) {
		if conn, err := net.DialTimeout("unix", filepath.Join(conf.Dir, "admin.sock"), time.Second); err == nil {
			conn.Close()
			return keystore.Moved{}, errors.New("a running copilot uses the store: stop it first (systemctl stop copilot)")
		}
		return server.MoveMaster(ctx, conf, c.Bool("to-file"))
	}, func(m keystore.Moved) {
		fmt.Printf("the master key is in %s, and was read back from there\n", m.To)
		if m.Removed != "" {
			fmt.Printf("removed %s\n", m.Removed)
		}
		if m.Left != "" {
			fmt.Printf("now remove the credential %s: copilot can't\n", m.Left)
		}
		if c.Bool("to-file") {
			fmt.Println("now remove [master-key] from copilot.toml")
		}
		for _, h := range m.Holders {
			if h != m.To {
				fmt.Printf("%s has it, too: if no copilot uses that any more, run \"copilot master forget %[1]s\"\n", h)
			}
		}
	})
}

func masterRotate(ctx context.Context, c *cli.Command) error {
	if err := noArguments(c); err != nil {
		return err
	}
	return masterAction(ctx, c, func(ctx context.Context, conf server.Config) (keystore.MasterStatus, error) {
		return server.RotateMaster(ctx, conf, func(s keystore.MasterStatus) {
			if !c.Bool("json") {
				fmt.Fprintf(os.Stderr, "copilot: master key %d is in use: sealing everything under it again\n", s.Current)
			}
		})
	}, func(s keystore.MasterStatus) {
		if s.Rotating {
			fmt.Printf("everything is sealed under master key %d; the one before is kept%s\n", s.Current, holders(" until it is held by ", s.Waiting))
			return
		}
		fmt.Printf("master key %d seals everything; the one before was dropped\n", s.Current)
	})
}

func masterForget(ctx context.Context, c *cli.Command) error {
	if c.NArg() != 1 {
		return exit.Usagef("master forget takes a holder, as \"copilot master status\" lists them, and got %d arguments", c.NArg())
	}
	return masterAction(ctx, c, func(ctx context.Context, conf server.Config) (keystore.MasterStatus, error) {
		return server.ForgetHolder(ctx, conf, c.Args().First())
	}, func(s keystore.MasterStatus) {
		fmt.Printf("forgotten%s\n", holders("; it is held by ", s.Keys[len(s.Keys)-1].Holders))
	})
}
