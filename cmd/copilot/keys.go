package main

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/ctrlplane/pilot/copilot"
)

var keysCommand = &cli.Command{
	Name:  "keys",
	Usage: "create, list, show, import, rotate and delete KEKs",
	Description: `Works on the store in --dir, through the copilot that serves there if one does.
No command shows a key.

Example:
   copilot keys create team-a`,
	Subcommands: []*cli.Command{
		{
			Name: "create", Usage: "make a new random KEK", ArgsUsage: "ID", Flags: keysFlags(),
			Action: onKEK(func(_ *cli.Context, keys copilot.Keys, id string) error {
				return done(keys.Create(id, nil))("created")
			}),
		},
		{
			Name: "import", Usage: "take a key from elsewhere", ArgsUsage: "ID",
			Description: `Reads 32 bytes, or 16 or 24 for the original's annotation format only.

Example:
   vault kv get -field=kek secret/team-a | copilot keys import --base64 --file - team-a`,
			Flags: keysFlags(
				&cli.StringFlag{Name: "file", Usage: "`FILE` with the key, or - for standard input", Required: true},
				&cli.BoolFlag{Name: "hex", Usage: "the file holds hexadecimal digits, not raw bytes"},
				&cli.BoolFlag{Name: "base64", Usage: "the file holds standard base64, not raw bytes"},
			),
			Action: func(c *cli.Context) error {
				// Reading may wait for somebody. The store is not locked yet.
				key, err := readKey(c)
				if err != nil {
					return fmt.Errorf("keys import: %w", err)
				}
				defer clear(key)
				return onKEK(func(_ *cli.Context, keys copilot.Keys, id string) error {
					return done(keys.Create(id, key))("imported")
				})(c)
			},
		},
		{
			Name: "rotate", Usage: "make a new version to wrap with; older ones still unwrap", ArgsUsage: "ID", Flags: keysFlags(),
			Action: onKEK(func(_ *cli.Context, keys copilot.Keys, id string) error {
				return done(keys.Rotate(id))("rotated")
			}),
		},
		{
			Name: "delete", Usage: "forget a KEK for ever", ArgsUsage: "ID",
			Flags: keysFlags(&cli.BoolFlag{Name: "yes", Usage: "yes, what was encrypted for this KEK shall be unreadable for ever"}),
			Action: onKEK(func(c *cli.Context, keys copilot.Keys, id string) error {
				if !c.Bool("yes") {
					return fmt.Errorf("images encrypted for %s could never be decrypted again: say --yes if that is what you want", id)
				}
				if err := keys.Delete(id); err != nil {
					return err
				}
				fmt.Printf("%s deleted\n", id)
				return nil
			}),
		},
		{
			Name: "show", Usage: "describe a KEK and its versions", ArgsUsage: "ID", Flags: keysFlags(jsonFlag()),
			Action: onKEK(func(c *cli.Context, keys copilot.Keys, id string) error {
				info, err := keys.Get(id)
				if err != nil {
					return err
				}
				if c.Bool("json") {
					return printJSON(info)
				}
				fmt.Printf("%s, current version %d\n", info.ID, info.Version)
				table := newTable("VERSION", "BITS", "CREATED")
				for _, v := range info.Versions {
					table.row(v.Version, v.Bits, v.Created.Format(time.RFC3339))
				}
				return table.Flush()
			}),
		},
		{
			Name: "list", Usage: "list the KEKs", Flags: keysFlags(jsonFlag()),
			Action: func(c *cli.Context) error {
				if err := noArguments(c); err != nil {
					return err
				}
				keys, err := copilot.OpenKeys(c.String("dir"), c.String("audit-log"))
				if err != nil {
					return err
				}
				defer keys.Close()
				list, err := keys.List()
				if err != nil {
					return err
				}
				if c.Bool("json") {
					return printJSON(list)
				}
				table := newTable("ID", "VERSION", "CREATED", "ROTATED")
				for _, info := range list {
					first, last := info.Versions[0], info.Versions[len(info.Versions)-1]
					rotated := "never"
					if last.Version != first.Version {
						rotated = last.Created.Format(time.RFC3339)
					}
					table.row(info.ID, info.Version, first.Created.Format(time.RFC3339), rotated)
				}
				return table.Flush()
			},
		},
	},
}

func keysFlags(more ...cli.Flag) []cli.Flag {
	return append([]cli.Flag{dirFlag(), auditLogFlag()}, more...)
}

func jsonFlag() cli.Flag {
	return &cli.BoolFlag{Name: "json", Usage: "print JSON"}
}

// onKEK returns the action of a command whose argument is a KEK's id.
func onKEK(do func(*cli.Context, copilot.Keys, string) error) cli.ActionFunc {
	return func(c *cli.Context) error {
		if c.NArg() != 1 {
			return fmt.Errorf("keys %s takes one KEK id, after the flags, and got %d arguments", c.Command.Name, c.NArg())
		}
		keys, err := copilot.OpenKeys(c.String("dir"), c.String("audit-log"))
		if err != nil {
			return err
		}
		defer keys.Close()
		id := c.Args().First()
		if err := do(c, keys, id); err != nil {
			return fmt.Errorf("keys %s %s: %w", c.Command.Name, id, err)
		}
		return nil
	}
}

// done returns a function that prints what happened to a KEK, if it did.
func done(info copilot.Info, err error) func(verb string) error {
	return func(verb string) error {
		if err == nil {
			fmt.Printf("%s %s, current version %d\n", info.ID, verb, info.Version)
		}
		return err
	}
}

// maxKeyFile bounds the file of a key to import, in bytes.
const maxKeyFile = 4096

// readKey reads the key that --file, --hex and --base64 tell of.
func readKey(c *cli.Context) ([]byte, error) {
	if c.Bool("hex") && c.Bool("base64") {
		return nil, errors.New("--hex and --base64 exclude each other")
	}
	file := os.Stdin
	if name := c.String("file"); name != "-" {
		var err error
		if file, err = os.Open(name); err != nil {
			return nil, err
		}
		defer file.Close()
	}
	b, err := io.ReadAll(io.LimitReader(file, maxKeyFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxKeyFile {
		return nil, fmt.Errorf("the key file has more than %d bytes", maxKeyFile)
	}
	return decodeKey(b, c.Bool("hex"), c.Bool("base64"))
}

func decodeKey(b []byte, isHex, isBase64 bool) ([]byte, error) {
	text := strings.TrimSpace(string(b))
	switch {
	case isHex:
		key, err := hex.DecodeString(text)
		if err != nil {
			return nil, errors.New("the key file does not hold hexadecimal digits") // err quotes one
		}
		return key, nil
	case isBase64:
		key, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			return nil, errors.New("the key file does not hold standard base64")
		}
		return key, nil
	}
	return append([]byte{}, b...), nil
}

func printJSON(v any) error {
	e := json.NewEncoder(os.Stdout)
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
