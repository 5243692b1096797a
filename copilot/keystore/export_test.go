package keystore

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"testing"
)

// Accesses are the accesses to a store that requests over HTTP made: what was done, by
// how often. Nothing is unsealed that was not read before.
type Accesses struct {
	mu    sync.Mutex
	count map[string]int
}

// Take returns the accesses since the last call.
func (a *Accesses) Take() map[string]int {
	a.mu.Lock()
	defer a.mu.Unlock()
	taken := a.count
	a.count = nil
	return taken
}

// Add counts an access of a request. Others, as of the broker's own tasks, do not count.
func (a *Accesses) Add(ctx context.Context, what string) {
	if ctx.Value(http.ServerContextKey) == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.count == nil {
		a.count = make(map[string]int)
	}
	a.count[what]++
}

// CountAccesses has stores whose database is "postgres://DIR" be in the file in DIR, and
// counts the accesses to them until the test ends.
func CountAccesses(t *testing.T) *Accesses {
	a := new(Accesses)
	open := openPostgres
	openPostgres = func(_ context.Context, url string) (database, error) {
		db, err := openBolt(strings.TrimPrefix(url, "postgres://"))
		return counted{db, a}, err
	}
	t.Cleanup(func() { openPostgres = open })
	return a
}

// counted is a database that counts the accesses to it.
type counted struct {
	database
	accesses *Accesses
}

func (c counted) get(ctx context.Context, id string) ([]byte, error) {
	c.accesses.Add(ctx, "get")
	return c.database.get(ctx, id)
}

func (c counted) list(ctx context.Context, wanted func(string) bool, do func(string, []byte) error) error {
	c.accesses.Add(ctx, "list")
	return c.database.list(ctx, wanted, func(id string, b []byte) error {
		c.accesses.Add(ctx, "get")
		return do(id, b)
	})
}

func (c counted) update(ctx context.Context, r row, beside string, change func(old, master, side []byte) (b, newSide []byte, err error)) error {
	c.accesses.Add(ctx, "update")
	return c.database.update(ctx, r, beside, change)
}

func (c counted) keep(ctx context.Context, name string, change func(old, master []byte) ([]byte, error)) error {
	c.accesses.Add(ctx, "keep")
	return c.database.keep(ctx, name, change)
}

func (c counted) named(ctx context.Context, prefix string, do func(string, []byte) error) error {
	c.accesses.Add(ctx, "named")
	return c.database.named(ctx, prefix, do)
}

func (c counted) addWraps(ctx context.Context, id string, version int, n int64) (int64, error) {
	c.accesses.Add(ctx, "addWraps")
	return c.database.addWraps(ctx, id, version, n)
}

func (c counted) wraps(ctx context.Context, id string) (map[int]int64, error) {
	c.accesses.Add(ctx, "wraps")
	return c.database.wraps(ctx, id)
}
