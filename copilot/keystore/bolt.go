package keystore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// boltDB is a database in a file, which one process at a time can open.
type boltDB struct{ db *bolt.DB }

// The file holds a bucket of KEKs by id; one of counts by id, a zero byte and
// the version, as eight bytes, the most significant first; and one of what
// once keeps.
var (
	bucketKEKs  = []byte("keks")
	bucketWraps = []byte("wraps")
	bucketOnce  = []byte("master")
)

const (
	boltFile = "keks.db"
	// lockWait is how long to wait for another process to close the file.
	lockWait = 5 * time.Second
)

// openBolt opens the file in the directory dir, making both if they are
// missing.
func openBolt(dir string) (database, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := checkDir(dir); err != nil {
		return nil, err
	}
	name := filepath.Join(dir, boltFile)
	if info, err := os.Stat(name); err == nil {
		if !info.Mode().IsRegular() {
			return nil, fmt.Errorf("%s is not a regular file", name)
		}
		forbidden := fs.FileMode(0o022)
		if in, err := os.Stat(dir); err == nil && isFSGroup(in) {
			forbidden = 0o002
		}
		if err := checkFile(name, info, forbidden, "written", "chmod 0600 it"); err != nil {
			return nil, err
		}
	}
	db, err := bolt.Open(name, 0o600, &bolt.Options{Timeout: lockWait})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("%s is in use by another copilot", name)
	}
	if err == nil {
		err = db.Update(func(tx *bolt.Tx) error {
			for _, name := range [][]byte{bucketKEKs, bucketWraps, bucketOnce} {
				if _, err := tx.CreateBucketIfNotExists(name); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			db.Close()
		}
	}
	if pathError := new(fs.PathError); errors.As(err, &pathError) {
		return nil, err // names it
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	return &boltDB{db}, nil
}

// readBolt opens a file that is there, to read.
func readBolt(name string) (database, error) {
	db, err := bolt.Open(name, 0o600, &bolt.Options{Timeout: lockWait, ReadOnly: true})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("%s is in use by another copilot", name)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	return &boltDB{db}, nil
}

func (d *boltDB) close() error { return d.db.Close() }

func (d *boltDB) get(_ context.Context, id string) (b []byte, err error) {
	err = d.db.View(func(tx *bolt.Tx) error {
		b = bytes.Clone(tx.Bucket(bucketKEKs).Get([]byte(id)))
		return nil
	})
	return b, err
}

func (d *boltDB) list(_ context.Context, wanted func(string) bool, do func(string, []byte) error) error {
	return d.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketKEKs).ForEach(func(id, b []byte) error {
			if name := string(id); wanted(name) {
				return do(name, bytes.Clone(b))
			}
			return nil
		})
	})
}

func (d *boltDB) update(_ context.Context, r row, beside string, change func(old, master, side []byte) (b, newSide []byte, err error)) error {
	return d.db.Update(func(tx *bolt.Tx) error {
		in, once := tx.Bucket(bucketOnce), tx.Bucket(bucketOnce)
		if r.kek {
			in = tx.Bucket(bucketKEKs)
		}
		get := func(bucket *bolt.Bucket, name string) []byte { return bytes.Clone(bucket.Get([]byte(name))) }
		b, side, err := change(get(in, r.name), get(once, masterName), get(once, beside))
		if err != nil {
			return err
		}
		if b == nil {
			err = in.Delete([]byte(r.name))
		} else {
			err = in.Put([]byte(r.name), b)
		}
		if err != nil {
			return err
		}
		return once.Put([]byte(beside), side)
	})
}

func (d *boltDB) keep(_ context.Context, name string, change func(old, master []byte) ([]byte, error)) error {
	return d.db.Update(func(tx *bolt.Tx) error {
		in, old := tx.Bucket(bucketOnce), bytes.Clone(tx.Bucket(bucketOnce).Get([]byte(name)))
		b, err := change(old, bytes.Clone(tx.Bucket(bucketOnce).Get([]byte(masterName))))
		if err != nil || old != nil && bytes.Equal(b, old) {
			return err
		}
		return in.Put([]byte(name), b)
	})
}

func (d *boltDB) keepAll(_ context.Context, names []string, change func(string, []byte) ([]byte, error)) error {
	return d.db.Update(func(tx *bolt.Tx) error {
		in := tx.Bucket(bucketOnce)
		for _, name := range names {
			b, err := change(name, bytes.Clone(in.Get([]byte(name))))
			if err == nil {
				err = in.Put([]byte(name), b)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

func (d *boltDB) reseal(_ context.Context, after string, n int, change func(string, []byte) ([]byte, error)) (last string, err error) {
	err = d.db.Update(func(tx *bolt.Tx) error {
		bucket := tx.Bucket(bucketKEKs)
		type record struct{ id, b []byte }
		var found, changed []record
		c := bucket.Cursor()
		id, b := c.Seek([]byte(after))
		if after != "" && string(id) == after {
			id, b = c.Next()
		}
		for ; id != nil && len(found) < n; id, b = c.Next() {
			found = append(found, record{id, b})
		}
		for _, r := range found {
			b, err := change(string(r.id), bytes.Clone(r.b))
			if err != nil {
				return err
			}
			if b != nil {
				changed = append(changed, record{bytes.Clone(r.id), b})
			}
		}
		if id != nil && len(found) > 0 {
			last = string(found[len(found)-1].id)
		}
		for _, r := range changed {
			if err := bucket.Put(r.id, r.b); err != nil {
				return err
			}
		}
		return nil
	})
	return last, err
}

func (d *boltDB) named(_ context.Context, prefix string, do func(string, []byte) error) error {
	return d.db.View(func(tx *bolt.Tx) error {
		bucket := tx.Bucket(bucketOnce)
		if bucket == nil {
			return nil // it was opened to read, and is new
		}
		c := bucket.Cursor()
		for k, v := c.Seek([]byte(prefix)); bytes.HasPrefix(k, []byte(prefix)); k, v = c.Next() {
			if err := do(string(k), bytes.Clone(v)); err != nil {
				return err
			}
		}
		return nil
	})
}

func (d *boltDB) addWraps(_ context.Context, id string, version int, n int64) (sum int64, err error) {
	err = d.db.Update(func(tx *bolt.Tx) error {
		bucket, key := tx.Bucket(bucketWraps), wrapsKey(id, version)
		if b := bucket.Get(key); len(b) == 8 {
			sum = int64(binary.BigEndian.Uint64(b))
		}
		sum += n
		return bucket.Put(key, wrapsValue(sum))
	})
	return sum, err
}

func (d *boltDB) wraps(_ context.Context, id string) (map[int]int64, error) {
	sums := make(map[int]int64)
	err := d.db.View(func(tx *bolt.Tx) error {
		prefix := append([]byte(id), 0)
		c := tx.Bucket(bucketWraps).Cursor()
		for k, v := c.Seek(prefix); bytes.HasPrefix(k, prefix) && len(v) == 8; k, v = c.Next() {
			var version int
			if _, err := fmt.Sscanf(string(k[len(prefix):]), "%d", &version); err == nil {
				sums[version] = int64(binary.BigEndian.Uint64(v))
			}
		}
		return nil
	})
	return sums, err
}

func (d *boltDB) sums(_ context.Context, prefix string, named, record func(string, [sha256.Size]byte) error) error {
	return d.db.View(func(tx *bolt.Tx) error {
		c := tx.Bucket(bucketOnce).Cursor()
		for k, v := c.Seek([]byte(prefix)); bytes.HasPrefix(k, []byte(prefix)); k, v = c.Next() {
			if err := named(string(k), sha256.Sum256(v)); err != nil {
				return err
			}
		}
		return tx.Bucket(bucketKEKs).ForEach(func(id, b []byte) error { return record(string(id), sha256.Sum256(b)) })
	})
}

func (d *boltDB) snapshot(ctx context.Context, prefixes []string, to contents) error {
	return d.db.View(func(tx *bolt.Tx) error {
		c := tx.Bucket(bucketOnce).Cursor()
		for _, prefix := range prefixes {
			for k, v := c.Seek([]byte(prefix)); bytes.HasPrefix(k, []byte(prefix)); k, v = c.Next() {
				if err := to.named(string(k), bytes.Clone(v)); err != nil {
					return err
				}
			}
		}
		err := tx.Bucket(bucketKEKs).ForEach(func(id, b []byte) error {
			if err := ctx.Err(); err != nil || to.wanted != nil && !to.wanted(string(id)) {
				return err
			}
			return to.record(string(id), bytes.Clone(b))
		})
		if err != nil || to.wraps == nil {
			return err
		}
		return tx.Bucket(bucketWraps).ForEach(func(k, v []byte) error {
			id, text, _ := bytes.Cut(k, []byte{0})
			version, err := strconv.Atoi(string(text))
			if err != nil || len(v) != 8 {
				return nil // as in wraps
			}
			return to.wraps(string(id), version, int64(binary.BigEndian.Uint64(v)))
		})
	})
}

func (d *boltDB) fill(_ context.Context, do func([]byte, contents) error) error {
	return d.db.Update(func(tx *bolt.Tx) error {
		keks, wraps := tx.Bucket(bucketKEKs), tx.Bucket(bucketWraps)
		if id, _ := keks.Cursor().First(); id != nil {
			return fmt.Errorf("%w, such as %s: restore into an empty one", ErrNotEmpty, id)
		}
		return do(bytes.Clone(tx.Bucket(bucketOnce).Get([]byte(masterName))), contents{
			named:  func(name string, b []byte) error { return tx.Bucket(bucketOnce).Put([]byte(name), b) },
			record: func(id string, b []byte) error { return keks.Put([]byte(id), b) },
			wraps:  func(id string, version int, n int64) error { return wraps.Put(wrapsKey(id, version), wrapsValue(n)) },
		})
	})
}

func wrapsKey(id string, version int) []byte { return fmt.Appendf(nil, "%s\x00%d", id, version) }

func wrapsValue(n int64) []byte { return binary.BigEndian.AppendUint64(nil, uint64(n)) }

func (d *boltDB) ready(context.Context) error {
	return d.db.View(func(*bolt.Tx) error { return nil })
}
