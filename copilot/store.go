package copilot

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// Errors of the store that a caller may decide by.
var (
	ErrNotFound = errors.New("no such KEK")
	ErrExists   = errors.New("there is a KEK of that name already")
	ErrInput    = errors.New("bad request")
)

// KeySize is the size in bytes of the KEKs that the store makes.
const KeySize = 32

// Info describes a KEK without its key.
type Info struct {
	ID       string        `json:"id"`
	Version  int           `json:"version"` // the current one
	Versions []VersionInfo `json:"versions"`
}

// VersionInfo describes one version of a KEK.
type VersionInfo struct {
	Version int       `json:"version"`
	Created time.Time `json:"created"`
	Bits    int       `json:"bits"`
}

// Store keeps KEKs in a bbolt file, each version of each KEK sealed with
// AES-256-GCM under a master key that is not in the file. It is safe for
// concurrent use; one process at a time can open a file.
type Store struct {
	db   *bolt.DB
	seal cipher.AEAD
}

// The file holds a bucket of KEKs: id → JSON of record. The other bucket has
// one entry, a constant sealed under the master key, to know the key again.
var (
	bucketKEKs   = []byte("keks")
	bucketMaster = []byte("master")
	masterCheck  = []byte("check")
)

// record is how a KEK is stored.
type record struct {
	Versions []sealedVersion `json:"versions"` // the last one is current
}

type sealedVersion struct {
	Version int       `json:"version"`
	Created time.Time `json:"created"`
	Bits    int       `json:"bits"`
	Sealed  []byte    `json:"sealed"` // 12-byte nonce, key, 16-byte tag
}

const (
	storeFile = "keks.db"
	// lockWait is how long to wait for another process to close the file.
	lockWait = 5 * time.Second
)

// OpenStore opens the store in the directory dir, making both if they are
// missing, with the master key from $CREDENTIALS_DIRECTORY/copilot-master-key
// if that exists, else from the file master.key in dir, which it makes.
func OpenStore(dir string) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	name := filepath.Join(dir, storeFile)
	db, err := bolt.Open(name, 0o600, &bolt.Options{Timeout: lockWait})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("%s is in use by another copilot", name)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	s := &Store{db: db}
	if err := s.unlock(dir); err != nil {
		db.Close()
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return s, nil
}

// unlock loads the master key, or makes it if the store is new, and checks
// that it is the one that the store was made with.
func (s *Store) unlock(dir string) error {
	return s.db.Update(func(tx *bolt.Tx) error {
		master := tx.Bucket(bucketMaster)
		key, err := masterKey(dir, master == nil)
		if err != nil {
			return err
		}
		defer clear(key)
		block, err := aes.NewCipher(key)
		if err != nil {
			return err
		}
		if s.seal, err = cipher.NewGCM(block); err != nil {
			return err
		}
		if master != nil {
			if _, err := s.open(master.Get(masterCheck), masterCheck); err != nil {
				return errors.New("the master key is not the one that the KEKs are sealed with: put that one back")
			}
			return nil
		}
		if master, err = tx.CreateBucket(bucketMaster); err != nil {
			return err
		}
		if _, err := tx.CreateBucket(bucketKEKs); err != nil {
			return err
		}
		return master.Put(masterCheck, s.sealed(nil, masterCheck))
	})
}

// Close closes the file.
func (s *Store) Close() error { return s.db.Close() }

// sealed encrypts b for the place that name tells.
func (s *Store) sealed(b, name []byte) []byte {
	nonce := make([]byte, s.seal.NonceSize(), s.seal.NonceSize()+len(b)+s.seal.Overhead())
	rand.Read(nonce) // never fails
	return s.seal.Seal(nonce, nonce, b, name)
}

// open undoes sealed.
func (s *Store) open(b, name []byte) ([]byte, error) {
	n := s.seal.NonceSize()
	if len(b) < n {
		return nil, errors.New("the sealed key is cut short")
	}
	return s.seal.Open(nil, b[:n], b[n:], name)
}

// place is what a sealed version is bound to.
func place(id string, version int) []byte {
	return fmt.Appendf(nil, "kek %d %s", version, id)
}

// validID is what an embedded KEK can be named.
var validID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$`)

func checkID(id string) error {
	if !validID.MatchString(id) {
		return fmt.Errorf("%w: %.60q can't be a KEK's name: use up to 128 letters, digits, dots, dashes, underscores and slashes, a letter or digit first", ErrInput, id)
	}
	for element := range strings.SplitSeq(id, "/") {
		if strings.Trim(element, ".") == "" {
			return fmt.Errorf("%w: %.60q can't be a KEK's name: between slashes there has to be more than dots", ErrInput, id)
		}
	}
	return nil
}

// Create makes a KEK named id with version 1, a new random key of 32 bytes, or
// key, of 16, 24 or 32 bytes, if that is not nil. Like each change, it is made
// only if log, which is told of it right before, returns nil.
func (s *Store) Create(id string, key []byte, log func(Info) error) (Info, error) {
	if err := checkID(id); err != nil {
		return Info{}, err
	}
	if key == nil {
		key = make([]byte, KeySize)
		rand.Read(key) // never fails
		defer clear(key)
	}
	switch len(key) {
	case 16, 24, KeySize:
	default:
		return Info{}, fmt.Errorf("%w: the key to import has %d bytes, not 32 (or 16 or 24, for the original's format only)", ErrInput, len(key))
	}
	return s.update(id, log, func(r *record) error {
		if len(r.Versions) > 0 {
			return ErrExists
		}
		s.add(r, id, key)
		return nil
	})
}

// Rotate gives the KEK a new version, of 32 random bytes, to wrap with. What
// was wrapped with older ones still unwraps.
func (s *Store) Rotate(id string, log func(Info) error) (Info, error) {
	key := make([]byte, KeySize)
	rand.Read(key) // never fails
	defer clear(key)
	return s.update(id, log, func(r *record) error {
		if len(r.Versions) == 0 {
			return ErrNotFound
		}
		s.add(r, id, key)
		return nil
	})
}

// Delete forgets a KEK with all its versions. What was wrapped with it can
// never be unwrapped again.
func (s *Store) Delete(id string, log func(Info) error) error {
	_, err := s.update(id, log, func(r *record) error {
		if len(r.Versions) == 0 {
			return ErrNotFound
		}
		r.Versions = nil
		return nil
	})
	return err
}

// Get describes a KEK.
func (s *Store) Get(id string) (Info, error) {
	r, err := s.read(id)
	if err != nil {
		return Info{}, err
	}
	return r.info(id), nil
}

// List describes all KEKs, in the order of their names.
func (s *Store) List() ([]Info, error) {
	list := []Info{}
	err := s.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketKEKs).ForEach(func(id, b []byte) error {
			r, err := decodeRecord(string(id), b)
			if err != nil {
				return err
			}
			list = append(list, r.info(string(id)))
			return nil
		})
	})
	return list, err
}

// Key returns the key of a version of a KEK and that version; 0 asks for the
// current one. The caller clears the key.
func (s *Store) Key(id string, version int) ([]byte, int, error) {
	r, err := s.read(id)
	if err != nil {
		return nil, 0, err
	}
	for _, v := range r.Versions {
		if v.Version == version || version == 0 && v.Version == r.current() {
			key, err := s.open(v.Sealed, place(id, v.Version))
			if err != nil {
				return nil, 0, fmt.Errorf("KEK %q version %d is damaged or was tampered with in the store", id, v.Version)
			}
			return key, v.Version, nil
		}
	}
	return nil, 0, fmt.Errorf("%w version %d", ErrNotFound, version)
}

// update changes a record in a transaction; one that fails changes nothing. A
// record without versions is removed.
func (s *Store) update(id string, log func(Info) error, change func(*record) error) (info Info, err error) {
	err = s.db.Update(func(tx *bolt.Tx) error {
		keks := tx.Bucket(bucketKEKs)
		var r record
		if b := keks.Get([]byte(id)); b != nil {
			var err error
			if r, err = decodeRecord(id, b); err != nil {
				return err
			}
		}
		if err := change(&r); err != nil {
			return err
		}
		info = r.info(id)
		if log != nil {
			if err := log(info); err != nil {
				return err
			}
		}
		if len(r.Versions) == 0 {
			return keks.Delete([]byte(id))
		}
		b, err := json.Marshal(r)
		if err != nil {
			return err
		}
		return keks.Put([]byte(id), b)
	})
	return info, err
}

func (s *Store) read(id string) (r record, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		if len(id) == 0 || len(id) > bolt.MaxKeySize {
			return ErrNotFound
		}
		b := tx.Bucket(bucketKEKs).Get([]byte(id))
		if b == nil {
			return ErrNotFound
		}
		r, err = decodeRecord(id, b)
		return err
	})
	return r, err
}

func (s *Store) add(r *record, id string, key []byte) {
	version := r.current() + 1
	r.Versions = append(r.Versions, sealedVersion{
		Version: version,
		Created: time.Now().UTC().Truncate(time.Second),
		Bits:    8 * len(key),
		Sealed:  s.sealed(key, place(id, version)),
	})
}

func decodeRecord(id string, b []byte) (record, error) {
	var r record
	if err := json.NewDecoder(bytes.NewReader(b)).Decode(&r); err != nil || len(r.Versions) == 0 {
		return record{}, fmt.Errorf("KEK %q is damaged in the store", id)
	}
	return r, nil
}

func (r record) current() int {
	if len(r.Versions) == 0 {
		return 0
	}
	return r.Versions[len(r.Versions)-1].Version
}

func (r record) info(id string) Info {
	i := Info{ID: id, Version: r.current()}
	for _, v := range r.Versions {
		i.Versions = append(i.Versions, VersionInfo{v.Version, v.Created, v.Bits})
	}
	return i
}
