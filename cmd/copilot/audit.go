package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/backup"
	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/internal/exit"
)

var auditCommand = &cli.Command{
	Name:  "audit",
	Usage: "verify the audit log",
	Description: `The audit log has a line for each request, chained to the one before.

Example:
   copilot audit verify`,
	Commands: []*cli.Command{acknowledgeCommand, {
		Name: "verify", Usage: "find lines of the audit log that were changed, removed or inserted", ArgsUsage: "[FILE]...",
		Description: `Reads the configured log, with the files that logrotate has moved away, or the
files given, oldest first, or - for standard input. It needs the master key, which
authenticates the lines. It finds lines that were cut off at the end by what
copilot records in its store. It prints where each chain ends.

With --since FILE, it also finds that the log was replaced together with the store
by older ones. If there is no problem, it replaces FILE with the ends that it found,
for the next time. FILE must exist, and is empty at first. --since also takes such
a line itself. Files that end before those lines are not needed any more.

With --backup FILE, it takes the key, and where the log ended then, from a backup: for
the log of a store whose master key is lost. Name the log's files, and what opens the
backup: --identity, or --share for each share.

The exit status is 3 if there is a problem, and 1 if the log can't be read.

Example:
   copilot audit verify --since /root/copilot-audit`,
		Flags: configFlags(openFlags(
			&cli.StringFlag{Name: "backup", Usage: "`FILE` of a backup to take the log's key from"},
			&cli.StringSliceFlag{Name: "since", Usage: "`FILE` with the lines that the last verification ended with, or such a line; may be repeated"},
			jsonFlag(),
		)...),
		Action: verifyAudit,
	}},
}

// auditReport is what "audit verify --json" prints.
type auditReport struct {
	OK       bool     `json:"ok"`
	Lines    int      `json:"lines"`
	Heads    []string `json:"heads"` // the ends of the chains, for --since
	Problems []string `json:"problems"`
	Notes    []string `json:"notes"`
}

func verifyAudit(ctx context.Context, c *cli.Command) error {
	conf, err := configuration(c)
	if err != nil {
		return err
	}
	since, file, err := readSince(c.StringSlice("since"))
	if err != nil {
		return fmt.Errorf("--since: %w", err)
	}
	name, fromBackup := conf.AuditName(), c.String("backup") != ""
	var key audit.Key
	// Before the log is read, which grows meanwhile.
	var heads []keystore.AuditHead
	var unread error
	if fromBackup {
		if key, heads, err = auditInBackup(c); err != nil {
			return err
		}
		name = logIn(heads, name)
	} else {
		if key, err = server.AuditKey(ctx, conf); err != nil {
			return asOwner(err)
		}
		heads, unread = server.AuditHeads(ctx, conf)
	}
	defer clear(key)
	written := server.HeadsOf(heads, name)
	var older []audit.Head // where the log itself is not among what is read
	if files := c.Args().Slice(); !fromBackup && len(files) > 0 && !slices.ContainsFunc(files, func(name string) bool { return isSameFile(name, conf.AuditTo()) }) {
		written, older = nil, written
	}
	log, err := openAuditLog(ctx, c, conf)
	if err != nil {
		return asOwner(err)
	}
	defer log.Close()
	acknowledged, why := server.AcknowledgedOf(heads, name)
	report, err := audit.VerifyTo(log, key, audit.Known{Written: written, Since: since, Acknowledged: acknowledged})
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	ends := make(map[string]audit.Head)
	for _, h := range report.Heads {
		ends[h.Chain] = h
	}
	for _, h := range audit.Cut(older, ends, since) {
		report.Notes = append(report.Notes, fmt.Sprintf("chain %s continues to line %d, which these files do not have", h.Chain, h.Seq))
	}
	for i, h := range acknowledged {
		if ends[h.Chain].Seq < h.Seq {
			report.Notes = append(report.Notes, fmt.Sprintf("chain %s up to line %d is missing, as acknowledged %s", h.Chain, h.Seq, why[i]))
		}
	}
	if other := otherLogs(heads, name); len(other) > 0 {
		report.Notes = append(report.Notes, "copilot has written other audit logs, which are not verified here: "+strings.Join(other, ", "))
	}
	if errors.Is(unread, keystore.ErrAuditHead) {
		report.Problems = append(report.Problems, unread.Error()+": lines may have been cut off at the log's end")
	} else if unread != nil {
		report.Notes = append(report.Notes, fmt.Sprintf("can't read what the store records of the log, so only --since finds lines that were cut off at its end: %s", unread))
	}
	if len(report.Problems) == 0 && file != "" {
		if err := audit.WriteHeads(file, report.Heads); err != nil {
			return fmt.Errorf("--since: the log has no problem, but the file can't be written: %w", err)
		}
	}
	return printReport(c.Bool("json"), report)
}

// auditInBackup returns the key of the audit log, and where the log ended, from a backup.
func auditInBackup(c *cli.Command) (key audit.Key, heads []keystore.AuditHead, err error) {
	name := c.String("backup")
	if c.NArg() == 0 {
		return nil, nil, exit.Usagef("--backup %s: name the files of the log, oldest first", name)
	}
	f, identities, err := sealedIn(c, name)
	if err != nil {
		return nil, nil, fmt.Errorf("--backup: %w", err)
	}
	defer f.Close()
	r, err := backup.Open(f, identities...)
	if err != nil {
		return nil, nil, fmt.Errorf("--backup: %s: %w", name, err)
	}
	for err == nil {
		var h keystore.Held
		h, err = r.Next()
		if h.KEK != nil {
			h.KEK.Clear()
		}
		if h.Head != nil {
			heads = append(heads, *h.Head)
		}
	}
	if !errors.Is(err, io.EOF) {
		clear(r.AuditKey)
		return nil, nil, fmt.Errorf("--backup: %s: %w", name, err)
	}
	return r.AuditKey, heads, nil
}

// logIn returns the name of the log that heads are of: the one that is configured, or the only
// one that there is.
func logIn(heads []keystore.AuditHead, configured string) string {
	names := make(map[string]bool)
	for _, h := range heads {
		names[h.Log] = true
	}
	if len(names) == 1 && !names[configured] {
		return heads[0].Log
	}
	return configured
}

// isSameFile reports whether two names are equal, or of the same file.
func isSameFile(a, b string) bool {
	if a == b {
		return true
	}
	infoA, errA := os.Stat(a)
	infoB, errB := os.Stat(b)
	return errA == nil && errB == nil && os.SameFile(infoA, infoB)
}

// otherLogs returns the store's other logs: those of other brokers, or of this one with
// another configuration.
func otherLogs(heads []keystore.AuditHead, log string) []string {
	last := make(map[string]time.Time)
	for _, h := range heads {
		if h.Log != log && h.Log != "" && h.At.After(last[h.Log]) {
			last[h.Log] = h.At
		}
	}
	var list []string
	for _, name := range slices.Sorted(maps.Keys(last)) {
		list = append(list, fmt.Sprintf("%s (until %s)", name, last[name].UTC().Format(time.RFC3339)))
	}
	return list
}

// readSince reads the values of --since, each of which is a head or a file of heads,
// and returns the file.
func readSince(values []string) (heads []audit.Head, file string, err error) {
	for _, v := range values {
		if h, err := audit.ParseHead(v); err == nil {
			heads = append(heads, h)
			continue
		}
		read, err := audit.ReadHeads(v)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, "", fmt.Errorf("%s is neither the end of a verified chain nor a file: create an empty file first (install -m 0600 /dev/null %[1]s)", v)
		}
		if err != nil {
			return nil, "", err
		}
		if file != "" {
			return nil, "", exit.Usagef("%s and %s: give one file", file, v)
		}
		heads, file = append(heads, read...), v
	}
	return heads, file, nil
}

func printReport(asJSON bool, report audit.Report) error {
	bad := len(report.Problems) > 0
	if asJSON {
		out := auditReport{!bad, report.Lines, []string{}, append([]string{}, report.Problems...), append([]string{}, report.Notes...)}
		for _, h := range report.Heads {
			out.Heads = append(out.Heads, h.String())
		}
		if err := printJSON(out); err != nil {
			return err
		}
	} else {
		for _, n := range report.Notes {
			fmt.Fprintln(os.Stderr, "note:", n)
		}
		for _, p := range report.Problems {
			fmt.Fprintln(os.Stderr, "PROBLEM:", p)
		}
	}
	if bad {
		return exit.DeniedError(fmt.Errorf("audit log: %d problems in %d lines", len(report.Problems), report.Lines))
	}
	if !asJSON {
		fmt.Printf("%d lines, none changed or missing\n", report.Lines)
		for _, h := range report.Heads {
			fmt.Println(h)
		}
	}
	return nil
}
