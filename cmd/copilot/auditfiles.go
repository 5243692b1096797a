package main

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/regular"
)

// auditLog is an audit log to read.
type auditLog struct {
	io.Reader
	closers []io.Closer
}

func (l *auditLog) Close() (err error) {
	for _, c := range l.closers {
		err = errors.Join(err, c.Close())
	}
	return err
}

// openAuditLog opens the files that are named, or the configured log. The caller closes
// it.
func openAuditLog(ctx context.Context, c *cli.Command, conf server.Config) (*auditLog, error) {
	files := c.Args().Slice()
	switch to := conf.AuditTo(); {
	case len(files) > 0:
	case to == "database":
		r, err := audit.ReadPostgres(ctx, conf.Database)
		if err != nil {
			return nil, err
		}
		return &auditLog{r, []io.Closer{r}}, nil
	case to == "-":
		return nil, exit.Usagef("the log goes to standard output: name the files that it was collected in")
	default:
		older, err := rotated(to)
		if err != nil {
			return nil, err
		}
		files = append(older, to)
	}
	l := &auditLog{}
	var readers []io.Reader
	for _, name := range files {
		r, err := l.open(name)
		if err != nil {
			return nil, errors.Join(err, l.Close())
		}
		readers = append(readers, r)
	}
	l.Reader = io.MultiReader(readers...)
	return l, nil
}

// open opens a file of the log, or standard input for "-".
func (l *auditLog) open(name string) (io.Reader, error) {
	if name == "-" {
		return os.Stdin, nil
	}
	f, err := regular.Open(name)
	if err != nil {
		return nil, err
	}
	l.closers = append(l.closers, f)
	if !strings.HasSuffix(name, ".gz") {
		return f, nil
	}
	r, err := gzip.NewReader(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return r, nil
}

// rotatedSuffix is what logrotate appends to a file's name: a number, or a date with
// its setting dateext.
var rotatedSuffix = regexp.MustCompile(`^[.-][0-9]+(\.gz)?$`)

// rotated returns the older files of a log that logrotate rotates, oldest first.
func rotated(name string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Dir(name))
	if err != nil {
		return nil, err
	}
	var found []fs.FileInfo
	for _, e := range entries {
		suffix, ok := strings.CutPrefix(e.Name(), filepath.Base(name))
		if !ok || !rotatedSuffix.MatchString(suffix) {
			continue
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue // logrotate has moved it
		}
		if err != nil {
			return nil, err
		}
		found = append(found, info)
	}
	slices.SortFunc(found, func(a, b fs.FileInfo) int { return a.ModTime().Compare(b.ModTime()) })
	var names []string
	for _, info := range found {
		names = append(names, filepath.Join(filepath.Dir(name), info.Name()))
	}
	return names, nil
}
