package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/internal/regular"
)

var auditCommand = &cli.Command{
	Name:  "audit",
	Usage: "verify the audit log",
	Subcommands: []*cli.Command{{
		Name: "verify", Usage: "find lines of the audit log that were changed, removed or put in", ArgsUsage: "[FILE]...",
		Description: `Reads the log that the configuration tells, or the files named, oldest first, or
- for standard input. It needs the master key, with which lines are
authenticated. It prints where each chain ends: keep that elsewhere, and give it
as --since the next time, so that lines cut off at the end are found too, and
older files need not be there any more.

Example:
   copilot audit verify --since 6f1c0a9b2d3e/1234/Jd3k… audit.log.1 audit.log`,
		Flags: configFlags(
			&cli.StringSliceFlag{Name: "since", Usage: "`LINE` that an earlier verification ended with; may be repeated"},
		),
		Action: verifyAudit,
	}},
}

func verifyAudit(c *cli.Context) error {
	conf, err := configuration(c)
	if err != nil {
		return err
	}
	key, err := keystore.AuditKey(conf.Dir)
	if err != nil {
		return err
	}
	var since []audit.Head
	for _, s := range c.StringSlice("since") {
		h, err := audit.ParseHead(s)
		if err != nil {
			return fmt.Errorf("--since: %w", err)
		}
		since = append(since, h)
	}
	var readers []io.Reader
	files := c.Args().Slice()
	switch to := conf.AuditTo(); {
	case len(files) > 0:
	case to == "database":
		r, err := audit.ReadPostgres(c.Context, conf.Database)
		if err != nil {
			return err
		}
		defer r.Close()
		readers = append(readers, r)
	case to == "-":
		return errors.New("the log goes to standard output: name the files in which it was collected")
	default:
		files = []string{to}
	}
	for _, name := range files {
		if name == "-" {
			readers = append(readers, os.Stdin)
			continue
		}
		f, err := regular.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		readers = append(readers, f)
	}
	report, err := audit.Verify(io.MultiReader(readers...), key, since...)
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	for _, n := range report.Notes {
		fmt.Fprintln(os.Stderr, "note:", n)
	}
	for _, p := range report.Problems {
		fmt.Fprintln(os.Stderr, "PROBLEM:", p)
	}
	if len(report.Problems) > 0 {
		return fmt.Errorf("audit log: %d problems in %d lines", len(report.Problems), report.Lines)
	}
	fmt.Printf("%d lines, none changed or missing\n", report.Lines)
	for _, h := range report.Heads {
		fmt.Println(h)
	}
	return nil
}
