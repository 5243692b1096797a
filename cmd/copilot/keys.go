package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/copilot/server/keyring"
	"github.com/ctrlplane/pilot/internal/commandline"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/keyjson"
	"github.com/ctrlplane/pilot/internal/regular"
)

var keysCommand = &cli.Command{
	Name:  "keys",
	Usage: "manage KEKs, and give out their public halves",
	Description: `Manages the KEKs of the configured store, through the copilot that has it open if
there is one, or with --server those of another machine. No command shows a key.

With --json, each prints the KEK, as "copilot keys show" does.

Example, a KEK's life:
   copilot keys create team-a
   copilot keys rotate team-a
   copilot keys disable --key-version 1 team-a
   copilot keys destroy --key-version 1 team-a`,
	Commands: []*cli.Command{
		{
			Name: "create", Usage: "create a KEK with a random key", ArgsUsage: "ID",
			Description: `The KEK has 32 bytes, and version 1. An ID is up to 128 letters, digits, dots,
dashes, underscores and slashes.

Example:
   copilot keys create team-a`,
			Flags: keysFlags(),
			Action: onKEK(func(ctx context.Context, c *cli.Command, keys server.Keys, id string) error {
				return done(keys.Create(ctx, id, nil))(c, "created")
			}),
		},
		{
			Name: "import", Usage: "create a KEK with a given key", ArgsUsage: "ID",
			Description: `Reads 32 bytes, or 16 or 24 for the original's annotation format only.

Example:
   vault kv get -field=kek secret/team-a | copilot keys import --base64 --file - team-a`,
			Flags: keysFlags(
				&cli.StringFlag{Name: "file", Usage: "`FILE` with the key, or - for standard input", Required: true},
				&cli.BoolFlag{Name: "hex", Usage: "the file holds hexadecimal digits, not raw bytes"},
				&cli.BoolFlag{Name: "base64", Usage: "the file holds standard base64, not raw bytes"},
			),
			Action: func(ctx context.Context, c *cli.Command) error {
				// Before the store is locked: reading standard input may take long.
				key, err := readKey(c)
				if err != nil {
					return fmt.Errorf("keys import: %w", err)
				}
				defer clear(key)
				return onKEK(func(ctx context.Context, c *cli.Command, keys server.Keys, id string) error {
					return done(keys.Create(ctx, id, key))(c, "imported")
				})(ctx, c)
			},
		},
		{
			Name: "rotate", Usage: "create a new version to wrap with; older ones still unwrap", ArgsUsage: "ID",
			Description: `Encrypted images keep the versions that they were encrypted with, until
"ctr-pilot images rewrap" moves them to the new one.

Example:
   copilot keys rotate team-a`,
			Flags: keysFlags(),
			Action: onKEK(func(ctx context.Context, c *cli.Command, keys server.Keys, id string) error {
				return done(keys.Rotate(ctx, id))(c, "rotated")
			}),
		},
		{
			Name: "disable", Usage: "stop a KEK, or one version of it, from being used", ArgsUsage: "ID",
			Description: `Nodes that have the KEK in memory use it until it expires there (pilot's
kek-cache-ttl, 5 minutes by default).

Example:
   copilot keys disable --key-version 1 team-a`,
			Flags: keysFlags(versionFlag()),
			Action: onKEK(func(ctx context.Context, c *cli.Command, keys server.Keys, id string) error {
				info, err := keys.Disable(ctx, id, c.Int("key-version"))
				warnCurrent(c, info, err)
				return done(info, err)(c, "disabled"+ofVersion(c))
			}),
		},
		{
			Name: "enable", Usage: "undo disable, or destroy while its waiting time lasts", ArgsUsage: "ID",
			Description: `Example:
   copilot keys enable team-a`,
			Flags: keysFlags(versionFlag()),
			Action: onKEK(func(ctx context.Context, c *cli.Command, keys server.Keys, id string) error {
				return done(keys.Enable(ctx, id, c.Int("key-version")))(c, "enabled"+ofVersion(c))
			}),
		},
		{
			Name: "destroy", Usage: "stop a KEK, or one version of it, from being used, and delete its key after a waiting time", ArgsUsage: "ID",
			Description: `After the waiting time, what was encrypted for it can never be decrypted again.
Until then, "copilot keys enable" undoes it.

Example:
   copilot keys destroy --key-version 1 team-a`,
			Flags: keysFlags(versionFlag(),
				&cli.GenericFlag{Name: "after", Usage: "how long to wait: a `TIME`, as in 30d or 12h, or a date, as in 2030-01-01", Value: commandline.After(server.DestroyAfter)},
				&cli.BoolFlag{Name: "yes", Usage: "with --after 0: confirm that what was encrypted for it becomes unreadable, permanently and now"},
			),
			Action: onKEK(func(ctx context.Context, c *cli.Command, keys server.Keys, id string) error {
				after, err := until(c, "after")
				if err != nil {
					return err
				}
				if after < time.Second && !c.Bool("yes") {
					return exit.Usagef("images encrypted for %s could never be decrypted again: confirm with --yes", id)
				}
				info, err := keys.Destroy(ctx, id, c.Int("key-version"), after)
				warnCurrent(c, info, err)
				return done(info, err)(c, "destroyed"+ofVersion(c)+", permanently from "+time.Now().Add(after).Format(time.RFC3339)+" on")
			}),
		},
		{
			Name: "revoke", Usage: "deny a KEK to an identity, whatever the policy says", ArgsUsage: "ID",
			Description: `Identities look as in the audit log. With --undo, the policy decides again.

Example:
   copilot keys revoke --identity spiffe://example.com/node/worker-7 team-a`,
			Flags: keysFlags(
				&cli.StringFlag{Name: "identity", Usage: "`ID` of the identity, as in the audit log", Required: true},
				&cli.BoolFlag{Name: "undo", Usage: "let the policy decide again"},
			),
			Action: onKEK(func(ctx context.Context, c *cli.Command, keys server.Keys, id string) error {
				if c.Bool("undo") {
					return done(keys.Reinstate(ctx, id, c.String("identity")))(c, "no longer revoked for "+c.String("identity"))
				}
				return done(keys.Revoke(ctx, id, c.String("identity")))(c, "revoked for "+c.String("identity"))
			}),
		},
		{
			Name: "show", Usage: "describe a KEK and its versions", ArgsUsage: "ID",
			Description: `Shows when each version was created, its state, the most keys that it can have
wrapped, and the identities that the KEK was revoked for. The key is never shown.

Example:
   copilot keys show team-a`,
			Flags: keysFlags(),
			Action: onKEK(func(ctx context.Context, c *cli.Command, keys server.Keys, id string) error {
				info, err := keys.Get(ctx, id)
				if err != nil {
					return err
				}
				if c.Bool("json") {
					return printJSON(info)
				}
				return show(info)
			}),
		},
		checkKEKCommand,
		publicCommand,
		{
			Name: "list", Usage: "list the KEKs",
			Description: `Lists the KEKs that the caller may do anything with: on the broker's machine, all. The
state is "unusable", and the exit status 3, if a KEK's record is damaged, or was put back
or deleted.

Example:
   copilot keys list`,
			Flags: keysFlags(),
			Action: func(ctx context.Context, c *cli.Command) error {
				if err := noArguments(c); err != nil {
					return err
				}
				keys, err := openKeys(ctx, c)
				if err != nil {
					return err
				}
				defer keys.Close()
				list, err := keys.List(ctx)
				if err != nil {
					return fmt.Errorf("keys list: %w", withStatus(err))
				}
				if c.Bool("json") {
					err = printJSON(list)
				} else {
					err = showList(list)
				}
				if err != nil {
					return err
				}
				return unusable(list)
			},
		},
	},
}

// show describes a KEK.
func show(info keyring.Info) error {
	fmt.Println(head(info))
	for _, who := range info.Revoked {
		fmt.Printf("revoked for %s\n", who)
	}
	if info.Backend != "" {
		if info.Path != "" {
			fmt.Printf("%s, path %s\n", info.Type, info.Path)
		}
		if info.StaysInKMS {
			fmt.Println("never exported: its KMS wraps and unwraps")
		}
		fmt.Printf("its versions are in the KMS, and those that copilot has used are below: \"copilot keys check %s\" shows the current one\n", info.ID)
		if len(info.Versions) == 0 {
			return nil
		}
	}
	table := newTable("VERSION", "BITS", "STATE", "WRAPS", "CREATED")
	for _, v := range info.Versions {
		state := string(v.State)
		if v.State == keystore.Destroying {
			state += " on " + v.DestroyAt.Format(time.RFC3339)
		}
		table.row(v.Version, orNone(v.Bits), state, v.Wraps, date(v.Created))
	}
	return table.Flush()
}

// head describes a KEK in one line.
func head(info keyring.Info) string {
	line := info.ID
	if info.Version != 0 {
		line += fmt.Sprintf(", current version %d", info.Version)
	}
	if info.Backend != "" {
		line += ", in " + info.Backend
	}
	if info.Disabled {
		line += ", disabled"
	}
	return line
}

// unusable returns an error if some of the KEKs can't be used.
func unusable(list []keyring.Info) error {
	list = slices.DeleteFunc(slices.Clone(list), func(i keyring.Info) bool { return i.Problem == "" })
	if len(list) == 0 {
		return nil
	}
	return exit.DeniedError(fmt.Errorf("keys list: %d KEKs can't be used, such as %s (%s): see \"copilot store check\" on the broker's machine", len(list), list[0].ID, list[0].Problem))
}

func showList(list []keyring.Info) error {
	table := newTable("ID", "VERSION", "STATE", "CREATED", "ROTATED")
	for _, info := range list {
		state, created, rotated := keystore.Enabled, "-", "never"
		if n := len(info.Versions); n > 0 {
			first, last := info.Versions[0], info.Versions[n-1]
			created, state = date(first.Created), last.State
			if last.Version != first.Version {
				rotated = date(last.Created)
			}
		}
		if info.Disabled {
			state = keystore.Disabled
		}
		if info.Problem != "" {
			state = "unusable"
		}
		name := info.ID
		if info.Backend != "" {
			name += " (in " + info.Backend + ")"
		}
		table.row(name, orNone(info.Version), state, created, rotated)
	}
	return table.Flush()
}

func orNone(n int) any {
	if n == 0 {
		return "-"
	}
	return n
}

func date(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.Format(time.RFC3339)
}

func keysFlags(more ...cli.Flag) []cli.Flag {
	return configFlags(append(append(serverFlags(), jsonFlag()), more...)...)
}

func versionFlag() cli.Flag {
	return &cli.IntFlag{Name: "key-version", Usage: "`NUMBER` of the version; without it, the whole KEK"}
}

func ofVersion(c *cli.Command) string {
	if v := c.Int("key-version"); v != 0 {
		return fmt.Sprintf(" in version %d", v)
	}
	return ""
}

// warnCurrent warns that a version was taken out of use that is needed to encrypt.
func warnCurrent(c *cli.Command, info keyring.Info, err error) {
	if v := c.Int("key-version"); err == nil && v != 0 && v == info.Version {
		fmt.Fprintf(os.Stderr, "copilot: warning: version %d is the current one: nothing can be encrypted for %s until \"copilot keys rotate %[2]s\"\n", v, info.ID)
	}
}

func jsonFlag() cli.Flag {
	return &cli.BoolFlag{Name: "json", Usage: "print JSON"}
}

// onKEK returns the action of a command whose argument is a KEK's id.
func onKEK(do func(context.Context, *cli.Command, server.Keys, string) error) cli.ActionFunc {
	return func(ctx context.Context, c *cli.Command) error {
		if c.NArg() != 1 {
			return exit.Usagef("keys %s takes one KEK id, and got %d arguments", c.Name, c.NArg())
		}
		keys, err := openKeys(ctx, c)
		if err != nil {
			return err
		}
		defer keys.Close()
		id := c.Args().First()
		if err := do(ctx, c, keys, id); err != nil {
			return fmt.Errorf("keys %s %s: %w", c.Name, id, withStatus(err))
		}
		return nil
	}
}

// withStatus adds the exit status to the broker's errors.
func withStatus(err error) error {
	e := new(server.StatusError)
	switch {
	case !errors.As(err, &e):
		return err
	case e.Denied():
		return exit.DeniedError(err)
	case e.Status == http.StatusBadRequest:
		return exit.UsageError(err)
	}
	return err
}

// done returns a function that prints a change of a KEK, if it was made.
func done(info keyring.Info, err error) func(c *cli.Command, verb string) error {
	return func(c *cli.Command, verb string) error {
		if err == nil && c.Bool("json") {
			return printJSON(info)
		}
		if err == nil {
			version := ""
			if info.Version != 0 {
				version = fmt.Sprintf(", current version %d", info.Version)
			}
			fmt.Printf("%s %s%s\n", info.ID, verb, version)
		}
		return err
	}
}

// maxKeyFile bounds the file of a key to import, in bytes.
const maxKeyFile = 4096

// readKey reads the key of --file, --hex and --base64.
func readKey(c *cli.Command) ([]byte, error) {
	if c.Bool("hex") && c.Bool("base64") {
		return nil, exit.Usagef("--hex and --base64 are mutually exclusive")
	}
	file := os.Stdin
	if name := c.String("file"); name != "-" {
		var err error
		if file, err = regular.Open(name); err != nil {
			return nil, err
		}
		defer file.Close()
	}
	b, err := keyjson.ReadAll(io.LimitReader(file, maxKeyFile+1))
	defer clear(b)
	if err != nil {
		return nil, err
	}
	if len(b) > maxKeyFile {
		return nil, fmt.Errorf("the key file is larger than %d bytes", maxKeyFile)
	}
	return decodeKey(b, c.Bool("hex"), c.Bool("base64"))
}

func decodeKey(b []byte, isHex, isBase64 bool) ([]byte, error) {
	text := bytes.TrimSpace(b)
	switch {
	case isHex:
		key, err := hex.AppendDecode(nil, text)
		if err != nil {
			clear(key)
			return nil, errors.New("the key file does not hold hexadecimal digits") // err quotes one
		}
		return key, nil
	case isBase64:
		key, err := base64.StdEncoding.AppendDecode(nil, text)
		if err != nil {
			clear(key)
			return nil, errors.New("the key file does not hold standard base64")
		}
		return key, nil
	}
	return bytes.Clone(b), nil
}

func printJSON(v any) error { return writeJSON(os.Stdout, v) }

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

type table struct{ *tabwriter.Writer }

func newTable(head ...any) table {
	t := table{tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', 0)}
	t.row(head...)
	return t
}

func (t table) row(cells ...any) {
	for i, cell := range cells {
		if i > 0 {
			fmt.Fprint(t, "\t")
		}
		fmt.Fprint(t, cell)
	}
	fmt.Fprintln(t)
}
