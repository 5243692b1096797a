package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/urfave/cli/v2"

	"github.com/ctrlplane/pilot/copilot"
	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/keystore"
)

var auditCommand = &cli.Command{
	Name:  "audit",
	Usage: "verify the audit log",
	Subcommands: []*cli.Command{{
		Name: "verify", Usage: "find lines of the audit log that were changed, removed or put in", ArgsUsage: "[FILE]...",
		Description: `Reads the log that the configuration tells, or the files named, oldest first, or
- for standard input. It needs the master key, with which lines are
authenticated. Lines that were cut off at the end are found by what copilot notes
in its store. It prints where each chain ends: keep that elsewhere, and give it as
--since the next time, so that a log that was put back together with the store is
found too, and older files need not be there any more.

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
	// Before the log is read, which goes on meanwhile.
	heads, err := copilot.AuditHeads(c.Context, conf)
	if err != nil {
		fmt.Fprintf(os.Stderr, "note: what the store notes of the log can't be read, so lines that were cut off at its end are found by --since only: %s\n", err)
	}
	written := copilot.HeadsOf(heads, conf.AuditName())
	var readers []io.Reader
	files := c.Args().Slice()
	older := written // where the log itself is not among what is read
	if len(files) == 0 || slices.Contains(files, conf.AuditTo()) {
		older = nil
	} else {
		written = nil
	}
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
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		readers = append(readers, f)
	}
	report, err := audit.VerifyTo(io.MultiReader(readers...), key, written, since...)
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	ends := make(map[string]audit.Head)
	for _, h := range report.Heads {
		ends[h.Chain] = h
	}
	for _, h := range audit.Cut(older, ends, since) {
		report.Notes = append(report.Notes, fmt.Sprintf("chain %s goes on to line %d, which these files do not have", h.Chain, h.Seq))
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
