//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/urfave/cli/v3"
	"golang.org/x/term"

	"github.com/ctrlplane/pilot/copilot/backup"
	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/partfile"
)

var backupCommand = &cli.Command{
	Name:  "backup",
	Usage: "back up the store into a sealed file, and check backups",
	Description: `Writes the store into a new file, while copilot runs or not: all KEKs as of one
moment, with their keys, versions, states, revocations and counts of wraps, and where
the audit log ends. Only those who hold the private key of a recipient, or enough
shares ("copilot backup shares"), can open it: it does not need the master key. The
audit log itself is not in it.

A recipient is an age public key, best a post-quantum one (age1pq1…), or an SSH one.
The default recipients are in the file that backup-recipients in copilot.toml names.

Example, which three of five people together can open:
   copilot backup shares --shares 5 --threshold 3 --out shares
   copilot backup --recipients-file shares/recipient.txt --out copilot-2026-01-31.backup`,
	Flags: configFlags(
		&cli.StringFlag{Name: "out", Usage: "`FILE` to write, which must not exist, or - for standard output"},
		&cli.StringSliceFlag{Name: "recipient", Usage: "age or SSH public `KEY` that can open the backup; may be repeated"},
		&cli.StringSliceFlag{Name: "recipients-file", Usage: "`FILE` with recipients, a line each; may be repeated"},
		jsonFlag(),
	),
	Action:   makeBackup,
	Commands: []*cli.Command{backupVerifyCommand, backupSharesCommand},
}

func makeBackup(ctx context.Context, c *cli.Command) error {
	out := c.String("out")
	if out == "" {
		return exit.Usagef("backup: --out is required, the file to write")
	}
	if out == "-" && term.IsTerminal(int(os.Stdout.Fd())) {
		return exit.Usagef("backup: standard output is a terminal: redirect it, or name a file with --out")
	}
	conf, err := configuration(c)
	if err != nil {
		return err
	}
	recipients, err := recipientsOf(c, conf)
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	if out == "-" {
		made, err := server.WriteBackup(ctx, conf, recipients, os.Stdout)
		if err != nil {
			return fmt.Errorf("backup: what was written, if anything, is no backup: %w", withStatus(asOwner(err)))
		}
		return reportBackup(c, os.Stderr, made)
	}
	if _, err := os.Lstat(out); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("backup: %s exists already: name a new file (%w)", out, err)
	}
	dir, err := os.OpenRoot(filepath.Dir(out))
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	defer dir.Close()
	partfile.Clean(dir, ".")
	part, err := partfile.Create(dir, ".", 0o600)
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	defer part.Discard()
	made, err := server.WriteBackup(ctx, conf, recipients, part)
	if err == nil {
		err = part.Commit(filepath.Base(out))
	}
	if err != nil {
		return fmt.Errorf("backup: nothing was written: %w", withStatus(asOwner(err)))
	}
	return reportBackup(c, os.Stdout, made)
}

// reportBackup writes what a backup has to w.
func reportBackup(c *cli.Command, w io.Writer, made server.Backup) error {
	if c.Bool("json") {
		return writeJSON(w, made)
	}
	_, err := fmt.Fprintf(w, "%s: %s\nsha256:%s\n", c.String("out"), made.Totals, made.SHA256)
	return err
}

// recipientsOf returns the recipients of flags, or else of the configuration.
func recipientsOf(c *cli.Command, conf server.Config) ([]string, error) {
	recipients, files := c.StringSlice("recipient"), c.StringSlice("recipients-file")
	if len(recipients)+len(files) == 0 {
		if conf.BackupRecipients == "" {
			return nil, exit.Usagef("name who can open it: --recipient or --recipients-file, or backup-recipients in copilot.toml (\"copilot backup shares\" makes one)")
		}
		files = []string{conf.BackupRecipients}
	}
	for _, name := range files {
		more, err := backup.ReadRecipients(name)
		if err != nil {
			return nil, err
		}
		recipients = append(recipients, more...)
	}
	if _, err := backup.ParseRecipients(recipients); err != nil {
		return nil, exit.UsageError(err)
	}
	return recipients, nil
}

var backupVerifyCommand = &cli.Command{
	Name: "verify", Usage: "open a backup and check all of it, without writing anything", ArgsUsage: "FILE",
	Description: `The drill for a restore: it opens the backup with the identity or the shares that a
restore would need, and reads it to its end. With --compare it also compares it with
the configured store, while copilot runs or not, and prints which KEKs the backup
lacks, has older, or has with another key.

The exit status is 3 if the comparison found a difference, and 1 if the backup can't
be restored.

Example:
   copilot backup verify --share share-1.txt --share share-4.txt --share share-5.txt copilot-2026-01-31.backup`,
	Flags: configFlags(openFlags(
		&cli.BoolFlag{Name: "compare", Usage: "compare the backup with the configured store"},
		jsonFlag(),
	)...),
	Action: verifyBackup,
}

// verifiedBackup is what "backup verify --json" prints.
type verifiedBackup struct {
	Created    time.Time `json:"created"`
	Copilot    string    `json:"copilot"`
	Generation int64     `json:"generation"`
	backup.Totals
	Differences []backup.Difference `json:"differences,omitempty"`
}

func verifyBackup(ctx context.Context, c *cli.Command) error {
	file, identities, err := sealed(c)
	if err != nil {
		return fmt.Errorf("backup verify: %w", err)
	}
	defer file.Close()
	r, err := backup.Open(file, identities...)
	if err != nil {
		return fmt.Errorf("backup verify: %s: %w", file.Name(), err)
	}
	defer clear(r.AuditKey)
	out := verifiedBackup{Created: r.Created, Copilot: r.Copilot, Generation: r.Generation}
	if c.Bool("compare") {
		var conf server.Config
		if conf, err = configuration(c); err != nil {
			return err
		}
		out.Differences, err = server.CompareBackup(ctx, conf, r)
	} else {
		_, err = r.Check()
	}
	if err != nil {
		return fmt.Errorf("backup verify: %s: %w", c.Args().First(), withStatus(asOwner(err)))
	}
	out.Totals = r.Totals()
	if c.Bool("json") {
		if err := printJSON(out); err != nil {
			return err
		}
	} else {
		fmt.Printf("the backup of %s is whole: %s\n", out.Created.Format(time.RFC3339), out.Totals)
		for _, d := range out.Differences {
			fmt.Printf("%s: %s\n", d.KEK, d.Text)
		}
	}
	if n := len(out.Differences); n > 0 {
		return exit.DeniedError(fmt.Errorf("backup verify: %d KEKs are not as in the store", n))
	}
	return nil
}

var restoreCommand = &cli.Command{
	Name: "restore", Usage: "fill an empty store with a backup", ArgsUsage: "FILE",
	Description: `Fills the configured store, a file or PostgreSQL, with all that a backup holds, sealed
under this store's master key, which is made if there is none. The store must not have
KEKs, and copilot must not run. The backup is checked to its end first. If anything
fails, or the command is interrupted, the store stays as it was.

Run it as the user that copilot runs as, who has to be able to read the files. What was
changed after the backup is lost: keys that were created, revocations, and what was
disabled or destroyed.

Example:
   systemctl stop copilot
   runuser -u copilot -- copilot restore --share share-1.txt --share share-4.txt --share share-5.txt copilot-2026-01-31.backup
   systemctl start copilot`,
	Flags: configFlags(openFlags(jsonFlag())...),
	Action: func(ctx context.Context, c *cli.Command) error {
		file, identities, err := sealed(c)
		if err != nil {
			return fmt.Errorf("restore: %w", err)
		}
		defer file.Close()
		conf, err := configuration(c)
		if err != nil {
			return err
		}
		made, err := server.Restore(ctx, conf, file, identities...)
		if err != nil {
			return fmt.Errorf("restore: %s: %w", file.Name(), withStatus(asOwner(err)))
		}
		if made.Created != "" {
			fmt.Fprintf(os.Stderr, "copilot: %s\n", made.Created)
		}
		if c.Bool("json") {
			return printJSON(made)
		}
		fmt.Printf("restored %s, as of %s\n", made.Totals, made.Backup.Created.Format(time.RFC3339))
		return nil
	},
}
