//go:build !no_postgres

package audit

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ctrlplane/pilot/copilot/postgres"
)

// appendTimeout bounds the wait for the database, which all requests share.
const appendTimeout = 5 * time.Second

const schema = `CREATE TABLE IF NOT EXISTS copilot_audit (
	chain text NOT NULL,
	seq   bigint NOT NULL,
	line  text NOT NULL,
	entry jsonb NOT NULL GENERATED ALWAYS AS (line::jsonb) STORED,
	id    bigint NOT NULL GENERATED ALWAYS AS IDENTITY UNIQUE,
	PRIMARY KEY (chain, seq)
)`

// OpenPostgres begins a log in the table copilot_audit of the database at
// url, where each run of a broker has a chain of its own. Known are the last
// lines of chains that are known to be there: those that are not are logged. Errors of
// the database wrap [ErrUnavailable].
func OpenPostgres(ctx context.Context, url string, key Key, known ...Head) (*Log, error) {
	t, err := openTable(ctx, url)
	if err != nil {
		return nil, err
	}
	missing, err := t.missing(ctx, key, known)
	var l *Log
	if err == nil {
		l, err = newLog(key, t, false, nil)
	}
	if err == nil {
		err = t.generation(ctx, l)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %w: %w", ErrUnavailable, errDatabase, postgres.Explain(err)), t.Close())
	}
	if len(missing) > 0 {
		l.miss("%d chains, among them %.80q, do not have the last line that copilot has noted: lines were deleted, or put back from a backup (\"copilot audit acknowledge\" if you have deleted them)", len(missing), missing[0].Chain)
	}
	return l, nil
}

func (t table) missing(ctx context.Context, _ Key, known []Head) ([]Head, error) {
	var chains, ends []string
	var seqs []int64
	for _, h := range known {
		chains, seqs, ends = append(chains, h.Chain), append(seqs, h.Seq), append(ends, macMember+h.MAC+macEnd)
	}
	rows, err := t.pool.Query(ctx, `SELECT h.number FROM unnest($1::text[], $2::bigint[], $3::text[]) WITH ORDINALITY AS h(chain, seq, ending, number)
		LEFT JOIN copilot_audit a ON a.chain = h.chain AND a.seq = h.seq
		WHERE a.line IS NULL OR right(a.line, length(h.ending)) <> h.ending ORDER BY h.chain`, chains, seqs, ends)
	if err != nil {
		return nil, err
	}
	numbers, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	var missing []Head
	for _, n := range numbers {
		missing = append(missing, known[n-1])
	}
	return missing, err
}

// lastOfChains selects the last line of each chain, by the index, with the one first that says
// that the store was changed most often.
const lastOfChains = `WITH RECURSIVE chains(chain) AS (
		(SELECT chain FROM copilot_audit ORDER BY chain LIMIT 1)
		UNION ALL SELECT (SELECT a.chain FROM copilot_audit a WHERE a.chain > c.chain ORDER BY a.chain LIMIT 1) FROM chains c WHERE c.chain IS NOT NULL
	) SELECT l.line FROM chains c
	CROSS JOIN LATERAL (SELECT line, entry->'generation' AS generation FROM copilot_audit a WHERE a.chain = c.chain ORDER BY a.seq DESC LIMIT 1) l
	ORDER BY CASE jsonb_typeof(l.generation) WHEN 'number' THEN l.generation::numeric END DESC NULLS LAST`

// generation notes in l how often the store had been changed by the last line of any chain:
// the log's last line may be of a copilot that had not seen all changes.
func (t table) generation(ctx context.Context, l *Log) error {
	rows, err := t.pool.Query(ctx, lastOfChains)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var text string
		if err := rows.Scan(&text); err != nil {
			return err
		}
		if read, _, err := l.key.open([]byte(text)); err == nil {
			l.claims(read.Generation)
			return nil
		}
	}
	return rows.Err()
}

// CopyToPostgres copies a log into the PostgreSQL database at url. Its table must be
// empty.
func CopyToPostgres(ctx context.Context, url string) (Copier, error) {
	t, err := openTable(ctx, url)
	if err != nil {
		return nil, err
	}
	last, err := t.head(nil, "")
	if err == nil && last != nil {
		err = errors.New("the database has an audit log already: copy to an empty one")
	}
	if err != nil {
		return nil, errors.Join(err, t.Close())
	}
	return t, nil
}

// openTable opens the table, which it makes if it is missing.
func openTable(ctx context.Context, url string) (table, error) {
	pool, err := connect(ctx, url)
	if err != nil {
		return table{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, appendTimeout)
	defer cancel()
	err = postgres.InTransaction(ctx, pool, func(tx pgx.Tx) error {
		// Of two brokers that create the table concurrently, one would fail.
		if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock(hashtext('copilot_audit'))`); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, schema)
		return err
	})
	if err != nil {
		pool.Close()
		return table{}, fmt.Errorf("%w: %w: %w", ErrUnavailable, errDatabase, postgres.Explain(err))
	}
	return table{pool}, nil
}

// connect returns connections that only the log uses: a change of a KEK that
// waits for its line must not have taken the last one.
func connect(ctx context.Context, url string) (*pgxpool.Pool, error) {
	pool, err := postgres.Connect(ctx, url, "copilot audit", 2)
	if err != nil {
		return nil, fmt.Errorf("audit log: %w", err)
	}
	return pool, nil
}

// table is a sink in a database.
type table struct{ pool *pgxpool.Pool }

func (t table) Close() error {
	t.pool.Close()
	return nil
}

func (t table) append(chain string, seq int64, lines [][]byte) error {
	ctx, cancel := context.WithTimeout(context.Background(), appendTimeout)
	defer cancel()
	texts := make([]string, len(lines))
	for i, l := range lines {
		texts[i] = string(l)
	}
	_, err := t.pool.Exec(ctx, `INSERT INTO copilot_audit (chain, seq, line)
		SELECT $1, $2 + n - 1, line FROM unnest($3::text[]) WITH ORDINALITY AS l(line, n)`, chain, seq, texts)
	if err != nil {
		return fmt.Errorf("%w: %w", errDatabase, postgres.Explain(err))
	}
	return nil
}

func (t table) head(_ Key, chain string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), appendTimeout)
	defer cancel()
	var line string
	query, args := `SELECT line FROM copilot_audit ORDER BY id DESC LIMIT 1`, []any{}
	if chain != "" {
		query, args = `SELECT line FROM copilot_audit WHERE chain = $1 ORDER BY seq DESC LIMIT 1`, []any{chain}
	}
	err := t.pool.QueryRow(ctx, query, args...).Scan(&line)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w: %w", ErrUnavailable, errDatabase, postgres.Explain(err))
	}
	return []byte(line), nil
}

// ReadPostgres returns the lines of all chains in the database at url,
// as [Verify] takes them. The caller closes the reader.
func ReadPostgres(ctx context.Context, url string) (io.ReadCloser, error) {
	pool, err := connect(ctx, url)
	if err != nil {
		return nil, err
	}
	rows, err := pool.Query(ctx, `SELECT line FROM copilot_audit ORDER BY chain, seq`)
	if err != nil {
		pool.Close()
		return nil, fmt.Errorf("audit log: %w", postgres.Explain(err))
	}
	r, w := io.Pipe()
	go func() {
		defer pool.Close()
		out := bufio.NewWriter(w)
		var line string
		_, err := pgx.ForEachRow(rows, []any{&line}, func() error {
			if strings.Contains(line, "\n") {
				return errors.New("audit log: a line of the database has several")
			}
			_, err := out.WriteString(line + "\n")
			return err
		})
		w.CloseWithError(errors.Join(err, out.Flush()))
	}()
	return r, nil
}
