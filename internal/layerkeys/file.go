package layerkeys

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// fileVersion is the version of the file's format.
const fileVersion = 1

// file is what the file has: a line of JSON, and a line with the JSON's SHA-256 in hex, so
// that no part of it can be missing.
type file struct {
	Version int                          `json:"version"`
	Begun   bool                         `json:"begun"`
	Layers  map[digest.Digest]Layer      `json:"layers"`
	Plain   map[digest.Digest]plainLayer `json:"plain"`
}

// ErrNewer is the error of a record that a newer version of pilot has written.
var ErrNewer = errors.New("written by a newer version of pilot")

// lockTimeout is how long Open waits for another process to close the record.
const lockTimeout = 5 * time.Second

// Open returns the record in the file at path, which it makes if there is none, mode 0600.
// A damaged file gets another name, and the record begins anew. The error wraps [ErrNewer]
// if the file can't be read by this version.
//
// If nothing can be written there, such as on a full disk, Open logs that, and [Record.Add]
// returns the error: plain images must not wait for it.
func Open(path string) (*Record, error) {
	r := newRecord(path)
	err := os.MkdirAll(filepath.Dir(path), 0o700)
	if err == nil {
		r.lock, err = lockFile(path + ".lock")
	}
	if errors.Is(err, errInUse) {
		return nil, r.wrap(err)
	}
	if err != nil {
		logrus.WithError(err).WithField("path", path).Error("record of layers can't be written: no encrypted layer is unpacked until it can")
	}
	if err := r.load(); err != nil {
		return nil, errors.Join(r.wrap(err), r.unlock())
	}
	return r, nil
}

// Close saves what is not saved yet, unless the file was removed, and lets others open the
// record.
func (r *Record) Close() error {
	return errors.Join(r.Flush(), r.unlock())
}

func (r *Record) unlock() error {
	if r.lock == nil {
		return nil
	}
	return r.lock.Close()
}

// errInUse is the error of a record that another process has open.
var errInUse = errors.New("another pilot uses it: give each a layer-record of its own")

// Flush saves what is not saved yet, unless the file was removed.
func (r *Record) Flush() error {
	if !r.isThere() {
		return nil
	}
	return r.Save()
}

func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for end := time.Now().Add(lockTimeout); ; time.Sleep(50 * time.Millisecond) {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
			return f, nil
		}
		if time.Now().After(end) {
			f.Close()
			return nil, errInUse
		}
	}
}

func (r *Record) load() error {
	b, err := os.ReadFile(r.path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	f, err := parse(b)
	if errors.Is(err, ErrNewer) {
		return fmt.Errorf("%w: install that version, or move the file away, and pilot makes a new one from the images that containerd has", err)
	}
	if err != nil {
		aside := r.path + ".damaged-" + time.Now().UTC().Format("20060102T150405")
		if err := os.Rename(r.path, aside); err != nil {
			aside = "" // nor can it be replaced
		}
		logrus.WithError(err).WithFields(logrus.Fields{"path": r.path, "moved-to": aside}).Error("record of layers damaged: it is made anew from the images that containerd has")
		return nil
	}
	r.use(f)
	r.changes, r.saved = 1, 1
	r.inode, err = os.Stat(r.path)
	return err
}

// Inspect returns how many encrypted layers are in the record at path, which may be in use.
// If there is no file, that is none.
func Inspect(path string) (layers int, err error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	var f file
	if err == nil {
		f, err = parse(b)
	}
	if err != nil {
		return 0, fmt.Errorf("record of layers %s: %w", path, err)
	}
	return len(f.Layers), nil
}

func parse(b []byte) (f file, err error) {
	var version struct{ Version int }
	text, sum, ok := bytes.Cut(b, []byte("\n"))
	if json.Unmarshal(text, &version) == nil && version.Version > fileVersion {
		return f, fmt.Errorf("format %d, and this one reads %d: %w", version.Version, fileVersion, ErrNewer)
	}
	if !ok || string(sum) != fmt.Sprintf("%x\n", sha256.Sum256(text)) {
		return f, errors.New("it is truncated, or was changed: its checksum does not match")
	}
	if err := json.Unmarshal(text, &f); err != nil {
		return f, err
	}
	if f.Version != fileVersion {
		return f, fmt.Errorf("format %d", f.Version)
	}
	return f, nil
}

// Save writes the file if something changed since, or if the file was removed or replaced.
// It leaves it if its directory was removed too, as by "pilot node uninstall".
func (r *Record) Save() error {
	if r.isCopy {
		return nil // see Read
	}
	r.mu.RLock()
	change := r.changes
	r.mu.RUnlock()
	if _, err := os.Stat(filepath.Dir(r.path)); change == 0 || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if !r.isThere() {
		r.saving.Lock()
		r.saved = 0
		r.saving.Unlock()
	}
	return r.save(change)
}

// isThere reports whether the file is the one that was written last.
func (r *Record) isThere() bool {
	r.saving.Lock()
	defer r.saving.Unlock()
	info, err := os.Stat(r.path)
	return err == nil && r.inode != nil && os.SameFile(info, r.inode) && info.Size() == r.inode.Size() && info.ModTime().Equal(r.inode.ModTime())
}

// save returns once a change is in the file. Callers that wait for one another's writing
// share the next.
func (r *Record) save(change uint64) error {
	if r.isCopy {
		return nil // see Read
	}
	r.saving.Lock()
	defer r.saving.Unlock()
	if r.saved >= change {
		return nil
	}
	r.mu.RLock()
	now := r.changes
	text, err := json.Marshal(file{fileVersion, r.begun, r.layers, r.plain})
	r.mu.RUnlock()
	if err != nil {
		return r.wrap(err)
	}
	info, err := replace(r.path, fmt.Appendf(text, "\n%x\n", sha256.Sum256(text)))
	if err != nil {
		return r.wrap(err)
	}
	r.saved, r.inode = now, info
	return nil
}

// replace replaces the file, or makes it, so that it survives a power failure.
func replace(path string, content []byte) (fs.FileInfo, error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	temporary := path + ".new"
	f, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	info, statErr := f.Stat()
	if err = errors.Join(err, statErr, f.Close()); err == nil {
		err = os.Rename(temporary, path)
	}
	if err != nil {
		os.Remove(temporary)
		return nil, err
	}
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	return info, errors.Join(d.Sync(), d.Close())
}
