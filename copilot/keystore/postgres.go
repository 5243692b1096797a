//go:build !no_postgres

package keystore

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ctrlplane/pilot/copilot/postgres"
)

// postgresDB is a database that several brokers share.
type postgresDB struct{ pool *pgxpool.Pool }

// schema makes the tables. The brokers' own key, which is not in the
// database, seals the keys in record.
const schema = `
CREATE TABLE IF NOT EXISTS copilot_keks (
	id      text PRIMARY KEY,
	record  bytea NOT NULL,
	changed timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE IF NOT EXISTS copilot_wraps (
	id      text NOT NULL,
	version int NOT NULL,
	wraps   bigint NOT NULL,
	PRIMARY KEY (id, version)
);
CREATE TABLE IF NOT EXISTS copilot_once (
	name  text PRIMARY KEY,
	value bytea NOT NULL
);`

const (
	// within bounds each call of the database, those that wait for another
	// broker's transaction too.
	within = 10 * time.Second
	// lockSpace keeps our advisory locks apart from those of others. They end with
	// their transaction, so they work through a connection pooler.
	lockSpace int32 = 0x70696c74
)

func init() { openPostgres, readPostgres = newPostgres, oldPostgres }

// newPostgres opens the database at url and creates the tables that are missing.
// Errors of the database wrap [ErrDatabase], and one of url does not.
func newPostgres(ctx context.Context, url string) (database, error) {
	pool, err := postgres.Connect(ctx, url, "copilot", 0)
	if err != nil {
		return nil, fmt.Errorf("database: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	err = postgres.InTransaction(ctx, pool, func(tx pgx.Tx) error {
		// Of two brokers that create the table concurrently, one would fail.
		if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock($1, 0)`, lockSpace); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, schema)
		return err
	})
	if err != nil {
		pool.Close()
		return nil, fmt.Errorf("%w: %w", ErrDatabase, postgres.Explain(err))
	}
	return &postgresDB{pool}, nil
}

// oldPostgres opens the database at url as it is.
func oldPostgres(ctx context.Context, url string) (database, error) {
	pool, err := postgres.Connect(ctx, url, "copilot", 0)
	if err != nil {
		return nil, fmt.Errorf("database: %w", err)
	}
	return &postgresDB{pool}, nil
}

func (d *postgresDB) close() error {
	d.pool.Close()
	return nil
}

func (d *postgresDB) get(ctx context.Context, id string) (b []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	err = d.pool.QueryRow(ctx, `SELECT record FROM copilot_keks WHERE id = $1`, id).Scan(&b)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, nil
	}
	return b, d.explain(err)
}

func (d *postgresDB) list(ctx context.Context, wanted func(string) bool, do func(string, []byte) error) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	rows, err := d.pool.Query(ctx, `SELECT id FROM copilot_keks`)
	if err != nil {
		return d.explain(err)
	}
	var id string
	var ids []string
	_, err = pgx.ForEachRow(rows, []any{&id}, func() error {
		if wanted(id) {
			ids = append(ids, id)
		}
		return nil
	})
	if err != nil || len(ids) == 0 {
		return d.explain(err)
	}
	if rows, err = d.pool.Query(ctx, `SELECT id, record FROM copilot_keks WHERE id = ANY($1) ORDER BY id COLLATE "C"`, ids); err != nil {
		return d.explain(err)
	}
	var b []byte
	var failed error
	_, err = pgx.ForEachRow(rows, []any{&id, &b}, func() error {
		failed = do(id, b)
		return failed
	})
	return cmp.Or(failed, d.explain(err))
}

func (d *postgresDB) update(ctx context.Context, id string, change func(old, master []byte) ([]byte, error)) error {
	return d.replace(ctx, id, change,
		`SELECT (SELECT record FROM copilot_keks WHERE id = $1), (SELECT value FROM copilot_once WHERE name = $2)`,
		`INSERT INTO copilot_keks (id, record) VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET record = excluded.record, changed = now()`)
}

func (d *postgresDB) keep(ctx context.Context, name string, change func(old, master []byte) ([]byte, error)) error {
	return d.replace(ctx, name, change,
		`SELECT (SELECT value FROM copilot_once WHERE name = $1), (SELECT value FROM copilot_once WHERE name = $2)`,
		`INSERT INTO copilot_once (name, value) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET value = excluded.value`)
}

// replace reads by one statement and writes by another, in a transaction that excludes
// others of the same name, and now and then of another.
func (d *postgresDB) replace(ctx context.Context, name string, change func(old, master []byte) ([]byte, error), read, write string) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	h := fnv.New32a()
	h.Write([]byte(name))
	// Whoever changes the master keys waits for all others, and they for it.
	lock := `SELECT pg_advisory_xact_lock_shared($1, 2), pg_advisory_xact_lock($1, $2)`
	if name == masterName {
		lock = `SELECT pg_advisory_xact_lock($1, 2), pg_advisory_xact_lock($1, $2)`
	}
	var failed error
	err := postgres.InTransaction(ctx, d.pool, func(tx pgx.Tx) error {
		// A row lock would not keep two brokers from creating the row.
		if _, err := tx.Exec(ctx, lock, lockSpace, int32(h.Sum32()|1)); err != nil {
			return err
		}
		var old, master, b []byte
		if err := tx.QueryRow(ctx, read, name, masterName).Scan(&old, &master); err != nil {
			return err
		}
		if b, failed = change(old, master); failed != nil {
			return failed
		}
		if old != nil && bytes.Equal(b, old) {
			return nil
		}
		_, err := tx.Exec(ctx, write, name, b)
		return err
	})
	return cmp.Or(failed, d.explain(err))
}

func (d *postgresDB) reseal(ctx context.Context, after string, n int, change func(string, []byte) ([]byte, error)) (last string, err error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	var failed error
	err = postgres.InTransaction(ctx, d.pool, func(tx pgx.Tx) error {
		// The locks of the rows keep others from changing them meanwhile.
		rows, err := tx.Query(ctx, `SELECT id, record FROM copilot_keks WHERE id > $1 ORDER BY id LIMIT $2 FOR UPDATE`, after, n)
		if err != nil {
			return err
		}
		var id string
		var old []byte
		var ids []string
		var records [][]byte
		found := 0
		last = ""
		if _, err := pgx.ForEachRow(rows, []any{&id, &old}, func() error {
			found++
			var b []byte
			if b, failed = change(id, old); b != nil {
				ids, records = append(ids, id), append(records, b)
			}
			return failed
		}); err != nil {
			return err
		}
		if found == n {
			last = id
		}
		if len(ids) == 0 {
			return nil
		}
		_, err = tx.Exec(ctx, `UPDATE copilot_keks SET record = changed.record FROM unnest($1::text[], $2::bytea[]) AS changed (id, record) WHERE copilot_keks.id = changed.id`, ids, records)
		return err
	})
	return last, cmp.Or(failed, d.explain(err))
}

func (d *postgresDB) named(ctx context.Context, prefix string, do func(string, []byte) error) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	rows, err := d.pool.Query(ctx, `SELECT name, value FROM copilot_once WHERE starts_with(name, $1) ORDER BY name`, prefix)
	if err != nil {
		return d.explain(err)
	}
	var name string
	var b []byte
	var failed error
	_, err = pgx.ForEachRow(rows, []any{&name, &b}, func() error {
		failed = do(name, b)
		return failed
	})
	return cmp.Or(failed, d.explain(err))
}

func (d *postgresDB) addWraps(ctx context.Context, id string, version int, n int64) (sum int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	err = d.pool.QueryRow(ctx, `INSERT INTO copilot_wraps (id, version, wraps) VALUES ($1, $2, $3)
		ON CONFLICT (id, version) DO UPDATE SET wraps = copilot_wraps.wraps + excluded.wraps RETURNING wraps`, id, version, n).Scan(&sum)
	return sum, d.explain(err)
}

func (d *postgresDB) wraps(ctx context.Context, id string) (map[int]int64, error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	rows, err := d.pool.Query(ctx, `SELECT version, wraps FROM copilot_wraps WHERE id = $1`, id)
	if err != nil {
		return nil, d.explain(err)
	}
	sums := make(map[int]int64)
	var version int
	var n int64
	_, err = pgx.ForEachRow(rows, []any{&version, &n}, func() error {
		sums[version] = n
		return nil
	})
	return sums, d.explain(err)
}

func (d *postgresDB) snapshot(ctx context.Context, prefix string, to contents) error {
	ctx, cancel := context.WithTimeout(ctx, exportTimeout)
	defer cancel()
	var failed error
	err := postgres.InSnapshot(ctx, d.pool, func(tx pgx.Tx) error {
		var name string
		var b []byte
		var version int
		var n int64
		for _, part := range []struct {
			query string
			args  []any
			into  []any
			do    func() error
		}{
			{`SELECT name, value FROM copilot_once WHERE starts_with(name, $1) ORDER BY name`, []any{prefix}, []any{&name, &b}, func() error { return to.named(name, b) }},
			{`SELECT id, record FROM copilot_keks ORDER BY id COLLATE "C"`, nil, []any{&name, &b}, func() error { return to.record(name, b) }},
			{`SELECT id, version, wraps FROM copilot_wraps ORDER BY id COLLATE "C", version`, nil, []any{&name, &version, &n}, func() error { return to.wraps(name, version, n) }},
		} {
			rows, err := tx.Query(ctx, part.query, part.args...)
			if err != nil {
				return err
			}
			_, err = pgx.ForEachRow(rows, part.into, func() error {
				failed = part.do()
				return failed
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	return cmp.Or(failed, d.explain(err))
}

// fillBatch is how many rows are inserted together.
const fillBatch = 1000

func (d *postgresDB) fill(ctx context.Context, do func(contents) error) error {
	ctx, cancel := context.WithTimeout(ctx, exportTimeout)
	defer cancel()
	var failed error
	err := postgres.InTransaction(ctx, d.pool, func(tx pgx.Tx) error {
		// Others may read meanwhile, and see nothing yet.
		if _, err := tx.Exec(ctx, `LOCK TABLE copilot_keks IN EXCLUSIVE MODE`); err != nil {
			return err
		}
		var id string
		err := tx.QueryRow(ctx, `SELECT id FROM copilot_keks LIMIT 1`).Scan(&id)
		if err == nil {
			failed = fmt.Errorf("%w, such as %s: restore into an empty one", ErrNotEmpty, id)
			return failed
		}
		if !errors.Is(err, pgx.ErrNoRows) {
			return err
		}
		var ids, counted []string
		var records [][]byte
		var versions []int
		var sums []int64
		flush := func() error {
			_, err := tx.Exec(ctx, `INSERT INTO copilot_keks (id, record) SELECT * FROM unnest($1::text[], $2::bytea[])`, ids, records)
			if err == nil {
				_, err = tx.Exec(ctx, `INSERT INTO copilot_wraps (id, version, wraps) SELECT * FROM unnest($1::text[], $2::int[], $3::bigint[])
					ON CONFLICT (id, version) DO UPDATE SET wraps = greatest(copilot_wraps.wraps, excluded.wraps)`, counted, versions, sums)
			}
			ids, records, counted, versions, sums = ids[:0], records[:0], counted[:0], versions[:0], sums[:0]
			return d.explain(err)
		}
		flushFull := func() error {
			if len(ids)+len(counted) < fillBatch {
				return nil
			}
			return flush()
		}
		failed = do(contents{
			record: func(id string, b []byte) error {
				ids, records = append(ids, id), append(records, b)
				return flushFull()
			},
			wraps: func(id string, version int, n int64) error {
				counted, versions, sums = append(counted, id), append(versions, version), append(sums, n)
				return flushFull()
			},
		})
		if failed == nil {
			failed = flush()
		}
		return failed
	})
	return cmp.Or(failed, d.explain(err))
}

func (d *postgresDB) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	var readOnly, standby bool
	if err := d.pool.QueryRow(ctx, `SELECT current_setting('transaction_read_only')::bool, pg_is_in_recovery()`).Scan(&readOnly, &standby); err != nil {
		return d.explain(err)
	}
	switch {
	case standby:
		return fmt.Errorf("%w: the database is a standby: %s", ErrUnavailable, postgres.ReadOnlyHint)
	case readOnly:
		return fmt.Errorf("%w: the database is read-only: %s", ErrUnavailable, postgres.ReadOnlyHint)
	}
	return nil
}

// explain wraps [ErrUnavailable] around the errors of a database that may work
// again later.
func (*postgresDB) explain(err error) error {
	switch {
	case err == nil:
		return nil
	case !postgres.Temporary(err):
		return fmt.Errorf("%w: %w", ErrDatabase, err)
	}
	return fmt.Errorf("%w: %w: %w", ErrUnavailable, ErrDatabase, postgres.Explain(err))
}
