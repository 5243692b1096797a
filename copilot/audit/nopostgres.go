//go:build no_postgres

package audit

import (
	"context"
	"errors"
	"io"
)

var errNoPostgres = errors.New("audit log: this copilot was built without PostgreSQL")

// OpenPostgres fails in a program that was built without PostgreSQL.
func OpenPostgres(context.Context, string, Key, ...Head) (*Log, error) { return nil, errNoPostgres }

// ReadPostgres fails in a program that was built without PostgreSQL.
func ReadPostgres(context.Context, string) (io.ReadCloser, error) { return nil, errNoPostgres }

// CopyToPostgres fails in a program that was built without PostgreSQL.
func CopyToPostgres(context.Context, string) (Copier, error) { return nil, errNoPostgres }
