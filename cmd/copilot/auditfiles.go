package main

import (
	"context"
	"errors"
	"io"
	"os"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/internal/exit"
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
		older, err := audit.Rotated(to)
		if err != nil {
			return nil, err
		}
		files = append(older, to)
	}
	return openAuditFiles(files)
}

// openAuditFiles opens the files of a log, which are in their order. The caller closes it.
func openAuditFiles(files []string) (*auditLog, error) {
	l := &auditLog{}
	var readers []io.Reader
	for _, name := range files {
		r, err := l.open(name)
		if err != nil {
			return nil, errors.Join(err, l.Close())
		}
		readers = append(readers, &wholeLines{Reader: r, last: '\n'})
	}
	l.Reader = io.MultiReader(readers...)
	return l, nil
}

// wholeLines ends the last line of a file, which a crash may have cut short: what follows is
// another file's.
type wholeLines struct {
	io.Reader
	last byte
}

func (w *wholeLines) Read(b []byte) (int, error) {
	n, err := w.Reader.Read(b)
	if n > 0 {
		w.last = b[n-1]
	}
	if err != io.EOF || w.last == '\n' {
		return n, err
	}
	if n == len(b) {
		return n, nil // there is no room before the next call
	}
	b[n], w.last = '\n', '\n'
	return n + 1, io.EOF
}

// open opens a file of the log, or standard input for "-".
func (l *auditLog) open(name string) (io.Reader, error) {
	if name == "-" {
		return os.Stdin, nil
	}
	f, err := audit.ReadFile(name)
	if err != nil {
		return nil, err
	}
	l.closers = append(l.closers, f)
	return f, nil
}
