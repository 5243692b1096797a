// Package postgres connects to PostgreSQL in a way that also works through a
// connection pooler in transaction mode, such as PgBouncer. There, each
// transaction may run in another session: nothing that a session remembers can
// be relied on, neither settings nor prepared statements.
package postgres

import (
	"context"
	"crypto/fips140"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// begin starts a transaction. No broker waits long for one that died in the
// middle of a change. As startup parameters, poolers would refuse the timeouts.
const (
	begin         = `BEGIN` + timeouts
	beginSnapshot = `BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY` + timeouts
	timeouts      = `; SET LOCAL lock_timeout = '8s'; SET LOCAL idle_in_transaction_session_timeout = '20s'`
)

// Connect returns a pool of connections to the database at url, a URL or a
// connection string as libpq has it. The pool connects when it is first used.
// The server lists the connections under the name of the application. A
// maxConns of 0 leaves the number to url, and to pgxpool. Errors do not contain
// the password.
func Connect(ctx context.Context, url, application string, maxConns int32) (*pgxpool.Pool, error) {
	conf, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, err
	}
	if fips140.Enforced() && conf.ConnConfig.RequireAuth == "" {
		// pgx panics where MD5 is not allowed.
		conf.ConnConfig.RequireAuth = "!md5"
	}
	if maxConns > 0 {
		conf.MaxConns = maxConns
	}
	if conf.ConnConfig.ConnectTimeout == 0 {
		conf.ConnConfig.ConnectTimeout = 5 * time.Second
	}
	conf.ConnConfig.RuntimeParams["application_name"] = application
	// pgx prepares statements by default, which the next session does not know.
	if !strings.Contains(url, "default_query_exec_mode") {
		conf.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeExec
	}
	return pgxpool.NewWithConfig(ctx, conf)
}

// InTransaction calls do in a transaction, and commits it if do returns nil.
func InTransaction(ctx context.Context, pool *pgxpool.Pool, do func(pgx.Tx) error) error {
	return pgx.BeginTxFunc(ctx, pool, pgx.TxOptions{BeginQuery: begin}, do)
}

// InSnapshot calls do in a transaction that only reads, and that sees the database as it
// was at its first statement.
func InSnapshot(ctx context.Context, pool *pgxpool.Pool, do func(pgx.Tx) error) error {
	return pgx.BeginTxFunc(ctx, pool, pgx.TxOptions{BeginQuery: beginSnapshot}, do)
}

// Temporary reports whether the database may well do later what it failed to do
// with err. It is false for the errors that are its answer to a statement.
func Temporary(err error) bool {
	answer, ok := errors.AsType[*pgconn.PgError](err)
	if !ok {
		return true
	}
	if lostStatement(answer) {
		return true
	}
	switch answer.Code[:min(2, len(answer.Code))] {
	case "": // a pooler's own
		return true
	case "08", "53", "55", "57", "40", "25": // connection, resources, locks, shutdown, conflicts, read-only
		return true
	}
	return false
}

// SQLSTATE codes (PostgreSQL's documentation, appendix A).
const (
	protocolViolation          = "08P01"
	readOnlyTransaction        = "25006"
	invalidStatementName       = "26000"
	invalidAuthorization       = "28000"
	duplicatePreparedStatement = "42P05"
)

// lostStatement reports whether a prepared statement is in another session than
// expected.
func lostStatement(err *pgconn.PgError) bool {
	return err.Code == invalidStatementName || err.Code == duplicatePreparedStatement
}

// Explain adds to err what to do about it, where that is known.
func Explain(err error) error {
	answer, ok := errors.AsType[*pgconn.PgError](err)
	if !ok {
		return err
	}
	switch {
	case lostStatement(answer):
		return fmt.Errorf("%w: a connection pooler gave the prepared statement to another session: remove default_query_exec_mode from the database's URL", err)
	case answer.Code == protocolViolation && strings.Contains(answer.Message, "startup parameter"):
		return fmt.Errorf("%w: a connection pooler refuses it: remove it from the database's URL, or add it to the pooler's ignore_startup_parameters", err)
	case answer.Code == invalidAuthorization:
		return fmt.Errorf("%w: name the role in the database's URL, or run this as the user that copilot runs as (runuser -u copilot -- copilot …)", err)
	case answer.Code == readOnlyTransaction:
		return fmt.Errorf("%w: %s", err, ReadOnlyHint)
	}
	return err
}

// ReadOnlyHint says what to do about a database that takes no changes.
const ReadOnlyHint = "connect to the primary (with several hosts in the database's URL, add target_session_attrs=read-write), or make the database writable again (default_transaction_read_only)"
