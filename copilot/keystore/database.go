package keystore

import (
	"context"
	"crypto/sha256"
)

// database keeps records by id. It is safe for concurrent use, by several
// processes too where it can be opened by several.
//
// What list, named, sums and snapshot call must not use the database: they hold a
// transaction or a connection, and a second one may wait for a change that waits for the
// first.
type database interface {
	// get returns a record, or nil if there is none of that id.
	get(ctx context.Context, id string) ([]byte, error)
	// list calls do with each record whose id is wanted, in the order of ids. The
	// others are not read.
	list(ctx context.Context, wanted func(id string) bool, do func(id string, b []byte) error) error
	// update replaces the record, nil if there is none, with what change
	// returns, in a transaction that excludes other changes of this record
	// and of what is kept under masterName, which change gets as master. It is not made
	// if change fails.
	// A record that change returns as nil is deleted. Beside it, what is kept under another
	// name, beside, is replaced in the same way.
	update(ctx context.Context, r row, beside string, change func(old, master, side []byte) (b, newSide []byte, err error)) error
	// reseal calls change with up to n records after the one named, in some order of ids
	// that is always the same, and replaces those for which it returns a record, in one
	// transaction. It returns the last id, or "" if there are no more.
	reseal(ctx context.Context, after string, n int, change func(id string, old []byte) ([]byte, error)) (last string, err error)
	// keep is update for what is kept under a name. A change of masterName excludes all
	// other changes, of records too. What change returns as it is, is not written.
	keep(ctx context.Context, name string, change func(old, master []byte) ([]byte, error)) error
	// keepAll is keep for several names, in one transaction that excludes all other changes.
	keepAll(ctx context.Context, names []string, change func(name string, old []byte) ([]byte, error)) error
	// named calls do with all that is kept under names that begin with prefix.
	named(ctx context.Context, prefix string, do func(name string, b []byte) error) error
	// addWraps adds n to the wraps of a version and returns the sum.
	addWraps(ctx context.Context, id string, version int, n int64) (int64, error)
	// wraps returns the sums of all versions.
	wraps(ctx context.Context, id string) (map[int]int64, error)
	// sums calls named and record with SHA-256 of all that is kept under names that begin with
	// prefix, then of all records in the order of ids, as of one moment.
	sums(ctx context.Context, prefix string, named, record func(name string, sum [sha256.Size]byte) error) error
	// snapshot calls to with all that is kept under names that begin with one of prefixes,
	// then with all records in the order of ids, then with all sums, as of one moment.
	snapshot(ctx context.Context, prefixes []string, to contents) error
	// fill calls do with what stores records and sums in an empty database, and with what is
	// kept under masterName, in one transaction that excludes all other changes. Nothing is
	// stored if do fails. The error wraps ErrNotEmpty if there is a record.
	fill(ctx context.Context, do func(master []byte, to contents) error) error
	// ready reports whether a change could be made now.
	ready(ctx context.Context) error
	close() error
}
