//go:build !no_postgres

package keystore

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
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

func (d *postgresDB) update(ctx context.Context, r row, beside string, change func(old, master, side []byte) (b, newSide []byte, err error)) error {
	read, write, remove := readOnce, writeOnce, `DELETE FROM copilot_once WHERE name = $1`
	if r.kek {
		read, remove = `SELECT record FROM copilot_keks WHERE id = $1`, `DELETE FROM copilot_keks WHERE id = $1`
		write = `INSERT INTO copilot_keks (id, record) VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET record = excluded.record, changed = now()`
	}
	return d.locked(ctx, []string{r.name, beside}, func(ctx context.Context, tx pgx.Tx) (failed, err error) {
		var old, master, side []byte
		if err := tx.QueryRow(ctx, `SELECT (`+read+`), (SELECT value FROM copilot_once WHERE name = $2), (SELECT value FROM copilot_once WHERE name = $3)`,
			r.name, masterName, beside).Scan(&old, &master, &side); err != nil {
			return nil, err
		}
		b, side, failed := change(old, master, side)
		if failed != nil {
			return failed, nil
		}
		if b == nil {
			_, err = tx.Exec(ctx, remove, r.name)
		} else {
			_, err = tx.Exec(ctx, write, r.name, b)
		}
		if err != nil {
			return nil, err
		}
		_, err = tx.Exec(ctx, writeOnce, beside, side)
		return nil, err
	})
}

const (
	readOnce  = `SELECT value FROM copilot_once WHERE name = $1`
	writeOnce = `INSERT INTO copilot_once (name, value) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET value = excluded.value`
)

func (d *postgresDB) keep(ctx context.Context, name string, change func(old, master []byte) ([]byte, error)) error {
	return d.locked(ctx, []string{name}, func(ctx context.Context, tx pgx.Tx) (failed, err error) {
		var old, master []byte
		if err := tx.QueryRow(ctx, `SELECT (`+readOnce+`), (SELECT value FROM copilot_once WHERE name = $2)`, name, masterName).Scan(&old, &master); err != nil {
			return nil, err
		}
		b, failed := change(old, master)
		if failed != nil || old != nil && bytes.Equal(b, old) {
			return failed, nil
		}
		_, err = tx.Exec(ctx, writeOnce, name, b)
		return nil, err
	})
}

func (d *postgresDB) keepAll(ctx context.Context, names []string, change func(string, []byte) ([]byte, error)) error {
	return d.locked(ctx, []string{masterName}, func(ctx context.Context, tx pgx.Tx) (failed, err error) {
		old := make(map[string][]byte)
		rows, err := tx.Query(ctx, `SELECT name, value FROM copilot_once WHERE name = ANY($1)`, names)
		if err != nil {
			return nil, err
		}
		var name string
		var b []byte
		if _, err := pgx.ForEachRow(rows, []any{&name, &b}, func() error {
			old[name] = b
			return nil
		}); err != nil {
			return nil, err
		}
		values := make([][]byte, len(names))
		for i, name := range names {
			if values[i], failed = change(name, old[name]); failed != nil {
				return failed, nil
			}
		}
		_, err = tx.Exec(ctx, `INSERT INTO copilot_once (name, value) SELECT * FROM unnest($1::text[], $2::bytea[])
			ON CONFLICT (name) DO UPDATE SET value = excluded.value`, names, values)
		return nil, err
	})
}

// Changes of the master keys, of all anchors, and of an empty database as a whole wait for all
// other changes, and these for them.
const (
	lockAll    = `SELECT pg_advisory_xact_lock($1, 2)`
	lockShared = `SELECT pg_advisory_xact_lock_shared($1, 2)`
)

// locked calls do in a transaction that excludes others of the same names, and now and
// then of another. Of what do returns, the first are errors that are not the database's.
func (d *postgresDB) locked(ctx context.Context, names []string, do func(context.Context, pgx.Tx) (failed, err error)) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	var failed error
	err := postgres.InTransaction(ctx, d.pool, func(tx pgx.Tx) (err error) {
		lock := lockShared
		if names[0] == masterName {
			lock = lockAll
		}
		if _, err := tx.Exec(ctx, lock, lockSpace); err != nil {
			return err
		}
		// A row lock would not keep two brokers from creating the row.
		var locks []int32
		for _, name := range names {
			h := fnv.New32a()
			h.Write([]byte(name))
			locks = append(locks, int32(h.Sum32()|1))
		}
		slices.Sort(locks) // so that no two wait for each other
		for _, l := range locks {
			if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock($1, $2)`, lockSpace, l); err != nil {
				return err
			}
		}
		if failed, err = do(ctx, tx); failed != nil {
			return failed
		}
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

func (d *postgresDB) sums(ctx context.Context, prefix string, named, record func(string, [sha256.Size]byte) error) error {
	var name string
	var sum []byte
	return d.read(ctx, []part{
		{`SELECT name, sha256(value) FROM copilot_once WHERE starts_with(name, $1) ORDER BY name`, []any{prefix}, []any{&name, &sum}, func() error { return named(name, [sha256.Size]byte(sum)) }},
		{`SELECT id, sha256(record) FROM copilot_keks ORDER BY id COLLATE "C"`, nil, []any{&name, &sum}, func() error { return record(name, [sha256.Size]byte(sum)) }},
	})
}

func (d *postgresDB) snapshot(ctx context.Context, prefixes []string, to contents) error {
	var name string
	var b []byte
	var version int
	var n int64
	parts := []part{
		{`SELECT name, value FROM copilot_once WHERE EXISTS (SELECT FROM unnest($1::text[]) AS p(prefix) WHERE starts_with(name, p.prefix)) ORDER BY name`, []any{prefixes}, []any{&name, &b}, func() error { return to.named(name, b) }},
	}
	if to.wanted == nil {
		parts = append(parts, part{`SELECT id, record FROM copilot_keks ORDER BY id COLLATE "C"`, nil, []any{&name, &b}, func() error { return to.record(name, b) }})
	} else {
		var ids []string
		parts = append(parts, part{`SELECT id FROM copilot_keks`, nil, []any{&name}, func() error {
			if to.wanted(name) {
				ids = append(ids, name)
			}
			return nil
		}}, part{`SELECT id, record FROM copilot_keks WHERE id = ANY($1) ORDER BY id COLLATE "C"`, []any{&ids}, []any{&name, &b}, func() error { return to.record(name, b) }})
	}
	if to.wraps != nil {
		parts = append(parts, part{`SELECT id, version, wraps FROM copilot_wraps ORDER BY id COLLATE "C", version`, nil, []any{&name, &version, &n}, func() error { return to.wraps(name, version, n) }})
	}
	return d.read(ctx, parts)
}

// part is one query of several, which do is called with the rows of.
type part struct {
	query string
	args  []any
	into  []any
	do    func() error
}

// read reads parts as of one moment, one after the other.
func (d *postgresDB) read(ctx context.Context, parts []part) error {
	ctx, cancel := context.WithTimeout(ctx, exportTimeout)
	defer cancel()
	var failed error
	err := postgres.InSnapshot(ctx, d.pool, func(tx pgx.Tx) error {
		for _, part := range parts {
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

func (d *postgresDB) fill(ctx context.Context, do func([]byte, contents) error) error {
	ctx, cancel := context.WithTimeout(ctx, exportTimeout)
	defer cancel()
	var failed error
	err := postgres.InTransaction(ctx, d.pool, func(tx pgx.Tx) error {
		// Others may read meanwhile, and see nothing yet.
		if _, err := tx.Exec(ctx, lockAll, lockSpace); err != nil {
			return err
		}
		var master []byte
		if err := tx.QueryRow(ctx, `SELECT (`+readOnce+`)`, masterName).Scan(&master); err != nil {
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
		failed = do(master, contents{
			named: func(name string, b []byte) error {
				_, err := tx.Exec(ctx, writeOnce, name, b)
				return d.explain(err)
			},
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
