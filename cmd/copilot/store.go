//go:build linux

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/internal/exit"
)

var storeCommand = &cli.Command{
	Name:  "store",
	Usage: "copy the store to another database, and look for records that were put back",
	Description: `The store has the KEKs, sealed under the master key: a file in --dir, or PostgreSQL.
"copilot backup" backs it up.

Example:
   copilot store check`,
	Commands: []*cli.Command{storeCheckCommand, storeAcknowledgeCommand, {
		Name: "copy", Usage: "copy KEKs and audit log from a file to PostgreSQL, or back", ArgsUsage: "FROM TO",
		Description: `FROM and TO are each a directory or a PostgreSQL URL. All KEKs are copied, with
their versions, states, revocations and counts of wraps, and the audit log with
its chains, also from files that logrotate has moved away. Nothing is decrypted: the master key stays the same, and is read from
--dir, or from FROM if that is a directory. TO must be empty. Stop copilot first:
later changes are not copied.

Example:
   systemctl stop copilot
   copilot store copy /var/lib/copilot 'postgres:///copilot?host=/var/run/postgresql'`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "config", Usage: "`FILE` with the configuration, if [master-key] there names a KMS"},
			&cli.StringFlag{Name: "dir", Usage: "`DIRECTORY` of master.key (default: the store's directory, or " + defaultDir + " between databases)"},
			&cli.StringFlag{Name: "audit-from", Usage: "`FILE` of the audit log (default: audit.log in FROM, or the database)"},
			&cli.StringFlag{Name: "audit-to", Usage: "`FILE` to copy the audit log to (default: audit.log in TO, or the database)"},
		},
		Action: storeCopy,
	}},
}

func storeCopy(ctx context.Context, c *cli.Command) error {
	if c.NArg() != 2 {
		return exit.Usagef("store copy takes FROM and TO, and got %d arguments", c.NArg())
	}
	from, to := c.Args().Get(0), c.Args().Get(1)
	master := c.String("dir")
	for _, name := range []string{from, to} {
		if keystore.IsDatabase(name) {
			continue
		}
		if conn, err := net.DialTimeout("unix", filepath.Join(name, "admin.sock"), time.Second); err == nil {
			conn.Close()
			return fmt.Errorf("store copy: a running copilot uses %s: stop it first (systemctl stop copilot)", name)
		}
		// Of two directories, the first has the key.
		master = cmp.Or(master, name)
	}
	master = cmp.Or(master, defaultDir)
	wrapping := server.Config{Dir: master, KMS: kmsTypes()}
	if name := c.String("config"); name != "" {
		if err := wrapping.ReadConfig(name); err != nil {
			return exit.UsageError(err)
		}
		wrapping.Dir = master
	}
	if target := auditOf(c.String("audit-to"), to); !keystore.IsDatabase(target) {
		if old, _ := audit.Rotated(target); len(old) > 0 {
			return fmt.Errorf("store copy: %s is of another audit log: move it away, or copy to a new directory", old[0])
		}
	}
	oldName, newName := logName(c.String("audit-from"), from), logName(c.String("audit-to"), to)
	n, err := keystore.Copy(ctx, from, to, master, func(log string) string {
		if log == oldName {
			return newName
		}
		return log
	}, wrapping.Wrapping()...)
	if err != nil {
		return fmt.Errorf("store copy: %w", asOwner(err))
	}
	fmt.Printf("copied %d KEKs\n", n)
	if wrapping.Wrapping() != nil {
		// The audit log's key is in the store.
		wrapping.Dir, wrapping.Database = from, ""
		if keystore.IsDatabase(from) {
			wrapping.Dir, wrapping.Database = master, from
		}
	}
	lines, err := auditCopy(ctx, c, from, to, wrapping)
	if err != nil {
		return fmt.Errorf("store copy: audit log: %w", err)
	}
	fmt.Printf("copied %d lines of the audit log\n", lines)
	return nil
}

// auditCopy copies the audit log, after verifying it, and verifies the copy.
func auditCopy(ctx context.Context, c *cli.Command, from, to string, conf server.Config) (int, error) {
	key, err := server.AuditKey(ctx, conf)
	if err != nil {
		return 0, err
	}
	source := auditOf(c.String("audit-from"), from)
	before, err := verified(ctx, source, key)
	if errors.Is(err, fs.ErrNotExist) && c.String("audit-from") == "" {
		fmt.Fprintf(os.Stderr, "copilot: %s does not exist: no audit log is copied\n", source)
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	if len(before.Problems) > 0 {
		fmt.Fprintf(os.Stderr, "copilot: the audit log has %d problems, which \"copilot audit verify\" lists: copied as it is\n", len(before.Problems))
	}
	target := auditOf(c.String("audit-to"), to)
	var copier audit.Copier
	if keystore.IsDatabase(target) {
		copier, err = audit.CopyToPostgres(ctx, target)
	} else {
		copier, err = audit.CopyToFile(target)
	}
	if err != nil {
		return 0, err
	}
	n, err := copyLines(ctx, copier, source, key)
	if err = errors.Join(err, copier.Close()); err != nil {
		return n, err
	}
	after, err := verified(ctx, target, key)
	if err == nil && (after.Lines != before.Lines || len(after.Problems) != len(before.Problems)) {
		err = fmt.Errorf("the copy has %d lines and %d problems, and the original %d and %d", after.Lines, len(after.Problems), before.Lines, len(before.Problems))
	}
	return n, err
}

// logName returns the name of the audit log in a store. An empty file is the default
// place.
func logName(file, store string) string {
	conf := server.Config{AuditLog: file}
	if keystore.IsDatabase(store) {
		conf.Database = store
	} else {
		conf.Dir = store
	}
	if keystore.IsDatabase(file) {
		conf.AuditLog = "database"
	}
	return conf.AuditName()
}

// auditOf returns where the audit log of a store is: a file, or a PostgreSQL URL.
func auditOf(file, store string) string {
	if file != "" || keystore.IsDatabase(store) {
		return cmp.Or(file, store)
	}
	return filepath.Join(store, "audit.log")
}

// openAudit opens a log: in a database, or in a file and those that logrotate has moved away.
func openAudit(ctx context.Context, name string) (io.ReadCloser, error) {
	if keystore.IsDatabase(name) {
		return audit.ReadPostgres(ctx, name)
	}
	files, err := audit.Rotated(name)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(name); len(files) == 0 || !errors.Is(err, fs.ErrNotExist) {
		files = append(files, name)
	}
	return openAuditFiles(files)
}

func verified(ctx context.Context, name string, key audit.Key) (audit.Report, error) {
	r, err := openAudit(ctx, name)
	if err != nil {
		return audit.Report{}, err
	}
	defer r.Close()
	return audit.Verify(r, key)
}

func copyLines(ctx context.Context, to audit.Copier, name string, key audit.Key) (int, error) {
	r, err := openAudit(ctx, name)
	if err != nil {
		return 0, err
	}
	defer r.Close()
	return audit.Copy(to, r, key)
}
