//go:build linux

package processor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containers/ocicrypt/config"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Bounds of what is read of a [KeyDir]. What exceeds them is among the unusable files.
const (
	maxKeyFiles = 32768    // files and directories, from the top down
	maxKeyDepth = 8        // directories in each other
	maxKeyFile  = 1 << 20  // bytes of a file
	maxKeyBytes = 16 << 20 // bytes of all files
)

// maxKeyReads is how often a directory that changes while it is read is read.
const maxKeyReads = 5

// KeyDir is a directory of private keys and certificates, each in a file of its
// own, like that of ctd-decoder's --decryption-keys-path. It may also be a single
// file.
//
// It is read for each layer that such a key may open, and keys are kept in memory no
// longer than that, so changes count at once. Unusable files of any kind do no harm.
// Links are followed. Names that begin with two dots are skipped: Kubernetes keeps the
// old and the new files of a volume there while it replaces them.
//
// A nil KeyDir has no keys. A KeyDir is safe for concurrent use.
type KeyDir struct {
	path    string
	changed func(KeyDirState)

	reading chan struct{} // has one while the directory is read, so that states come in order
	last    *KeyDirState
}

// NewKeyDir returns the directory at path, or nil if path is empty. It calls
// changed, which may be nil, whenever it finds another state than before.
func NewKeyDir(path string, changed func(KeyDirState)) *KeyDir {
	if path == "" {
		return nil
	}
	return &KeyDir{path: path, changed: changed, reading: make(chan struct{}, 1)}
}

// KeyDirState is what a [KeyDir] contains.
type KeyDirState struct {
	Path     string
	Usable   int // files
	Unusable []UnusableKey
}

// UnusableKey is a file, or a directory, of which no key can be used.
type UnusableKey struct {
	Path   string
	Reason string // and what to do about it; contains nothing of the file
}

func (k UnusableKey) String() string { return fmt.Sprintf("%.250q is %s", k.Path, k.Reason) }

// Summary lists the unusable files in one line, at most that many of them. It is
// empty if there are keys and all can be used.
func (s KeyDirState) Summary(most int) string {
	var list []string
	for i, k := range s.Unusable {
		if i == most {
			list = append(list, fmt.Sprintf("%d more can't be used", len(s.Unusable)-i))
			break
		}
		list = append(list, k.String())
	}
	if s.Usable == 0 && len(list) == 0 {
		return fmt.Sprintf("%.250q contains no key", s.Path)
	}
	return strings.Join(list, "; ")
}

// State reads the directory and returns what it contains. The error is that of
// ctx.
func (d *KeyDir) State(ctx context.Context) (KeyDirState, error) {
	keys, err := d.read(ctx)
	if err != nil {
		return KeyDirState{}, err
	}
	keys.clear()
	return keys.state, nil
}

// Unwrap is [Unwrap] with the private keys of the directory and then keys. If none gave
// the layer key, its error also names unusable files.
func (d *KeyDir) Unwrap(ctx context.Context, keys Keys, desc ocispec.Descriptor) (*LayerKey, error) {
	return d.with(ctx, keys, []ocispec.Descriptor{desc}, func(keys Keys) (*LayerKey, error) {
		return Unwrap(ctx, keys, desc)
	})
}

// UnwrapAny is [UnwrapAny] with the private keys of the directory and then keys. If none
// gave the layer key, its error also names unusable files.
func (d *KeyDir) UnwrapAny(ctx context.Context, timeout time.Duration, keys Keys, descs []ocispec.Descriptor, accept func(*LayerKey) (bool, error)) (*LayerKey, error) {
	reading, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return d.with(reading, keys, descs, func(keys Keys) (*LayerKey, error) {
		return UnwrapAny(ctx, timeout, keys, descs, accept)
	})
}

// Openers is [Openers] with the private keys of the directory and then keys.
func (d *KeyDir) Openers(ctx context.Context, keys Keys, desc ocispec.Descriptor, accept func(*LayerKey) bool) (openers []Opener, complete bool) {
	_, err := d.with(ctx, keys, []ocispec.Descriptor{desc}, func(keys Keys) (*LayerKey, error) {
		openers, complete = Openers(ctx, keys, desc, accept)
		return nil, nil
	})
	return openers, complete && err == nil
}

// with calls unwrap with keys and, if a key in a file may be for one of the descriptors,
// those of the directory before them.
func (d *KeyDir) with(ctx context.Context, keys Keys, descs []ocispec.Descriptor, unwrap func(Keys) (*LayerKey, error)) (*LayerKey, error) {
	byKey := func(scheme string) bool { return !strings.HasPrefix(scheme, providerScheme) }
	if d == nil || !slices.ContainsFunc(descs, func(desc ocispec.Descriptor) bool { return slices.ContainsFunc(wrappedWith(desc), byKey) }) {
		return unwrap(keys)
	}
	own, err := d.read(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the keys in %s: %w", d.path, err)
	}
	defer own.clear()
	key, err := unwrap(keys.With(&own.DecryptConfig))
	if summary := own.state.Summary(maxReasons); errors.Is(err, ErrNoKey) && summary != "" {
		err = fmt.Errorf("%w; decryption keys: %s", err, summary)
	}
	return key, err
}

// dirKeys are the keys of a KeyDir.
type dirKeys struct {
	config.DecryptConfig
	state KeyDirState
}

func (k *dirKeys) clear() { clearKeys(&k.DecryptConfig) }

// read reads the directory, which may be on a file system that hangs.
// The caller must clear the keys.
func (d *KeyDir) read(ctx context.Context) (*dirKeys, error) {
	// Here and not below: what waits for a file system that hangs must not pile up.
	select {
	case d.reading <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return await(ctx, func() (*dirKeys, error) {
		defer func() { <-d.reading }()
		keys := readKeys(d.path)
		if d.last == nil || !reflect.DeepEqual(keys.state, *d.last) {
			d.last = &keys.state
			if d.changed != nil {
				d.changed(keys.state)
			}
		}
		return keys, nil
	}, (*dirKeys).clear)
}

// readKeys reads the keys that were in dir at one moment, unless it changes
// all the time.
func readKeys(dir string) *dirKeys {
	before := listKeys(dir)
	for try := 1; ; try++ {
		keys := before.load(dir)
		after := listKeys(dir)
		if after.equal(before) || try == maxKeyReads {
			return keys
		}
		keys.clear()
		before = after
	}
}

// keyList are the files of a KeyDir, which are not read yet.
type keyList struct {
	files    []keyFile
	unusable []UnusableKey
	entries  int
	dirs     []keySubdir     // that are not listed yet
	listed   map[fileID]bool // directories, to which links can lead back
}

type keySubdir struct {
	path  string
	id    fileID
	depth int // how many directories it is in
}

type keyFile struct {
	path string
	id   fileID
}

// fileID changes whenever a file does, except within one tick of the kernel's
// clock, a few milliseconds.
type fileID struct {
	dev, ino     uint64
	size         int64
	mtime, ctime syscall.Timespec
}

func (l *keyList) equal(other *keyList) bool {
	return slices.Equal(l.files, other.files) && slices.Equal(l.unusable, other.unusable)
}

func listKeys(dir string) *keyList {
	l := &keyList{listed: map[fileID]bool{}}
	l.add(dir, 0)
	for len(l.dirs) > 0 {
		next := l.dirs[0]
		l.dirs = l.dirs[1:]
		l.addEntries(next)
	}
	return l
}

func (l *keyList) leaveOut(path, reason string) {
	l.unusable = append(l.unusable, UnusableKey{path, reason})
}

// add adds what is at path, in depth directories of the KeyDir.
func (l *keyList) add(path string, depth int) {
	info, err := os.Stat(path)
	if err != nil {
		l.leaveOut(path, unreadable(path, err))
		return
	}
	switch mode := info.Mode(); {
	case mode.IsDir():
		l.dirs = append(l.dirs, keySubdir{path, identify(info), depth})
	case !mode.IsRegular():
		l.leaveOut(path, "not a file but a pipe, a socket or a device: move it out of the directory")
	case info.Size() > maxKeyFile:
		l.leaveOut(path, fmt.Sprintf("larger than %d KiB and not read: move it out of the directory", maxKeyFile>>10))
	default:
		l.files = append(l.files, keyFile{path, identify(info)})
	}
}

// addEntries adds the entries of a directory.
func (l *keyList) addEntries(dir keySubdir) {
	if l.listed[dir.id] {
		return
	}
	l.listed[dir.id] = true
	if dir.depth > maxKeyDepth {
		l.leaveOut(dir.path, fmt.Sprintf("a directory in %d others and not read", maxKeyDepth))
		return
	}
	f, err := os.OpenFile(dir.path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
	if err != nil {
		l.leaveOut(dir.path, unreadable(dir.path, err))
		return
	}
	defer f.Close()
	entries, err := f.ReadDir(maxKeyFiles - l.entries + 1)
	if err != nil && err != io.EOF {
		l.leaveOut(dir.path, unreadable(dir.path, err))
		return
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	for _, e := range entries {
		switch {
		case strings.HasPrefix(e.Name(), ".."):
		case l.entries == maxKeyFiles:
			l.leaveOut(dir.path, fmt.Sprintf("too full: %d files are read, and what is left here is not", maxKeyFiles))
			return
		default:
			l.entries++
			l.add(filepath.Join(dir.path, e.Name()), dir.depth+1)
		}
	}
}

func identify(info fs.FileInfo) fileID {
	s := info.Sys().(*syscall.Stat_t)
	return fileID{dev: uint64(s.Dev), ino: s.Ino, size: s.Size, mtime: s.Mtim, ctime: s.Ctim}
}

// unreadable returns the reason for the error of a system call with path.
func unreadable(path string, err error) string {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if target, err := os.Readlink(path); err == nil {
			return fmt.Sprintf("a link to %.250q, which does not exist", target)
		}
		return "missing: it does not exist"
	case errors.Is(err, fs.ErrPermission):
		return "not readable for this process: permission denied"
	case errors.Is(err, syscall.ELOOP):
		return "a loop of links"
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return "not readable: " + errno.Error()
	}
	return "not readable"
}

// load reads the files of the list.
func (l *keyList) load(dir string) *dirKeys {
	keys := &dirKeys{DecryptConfig: config.DecryptConfig{Parameters: map[string][][]byte{}}}
	unusable := slices.Clone(l.unusable)
	room := int64(maxKeyBytes)
	for _, f := range l.files {
		if f.id.size > room {
			unusable = append(unusable, UnusableKey{f.path, fmt.Sprintf("one too many and not read: the files before it have %d MiB", maxKeyBytes>>20)})
			continue
		}
		room -= f.id.size
		b, err := f.read()
		parameter, reason := "", ""
		if err != nil {
			reason = unreadable(f.path, err)
		} else if err := CheckPrivateKey(b); err != nil {
			reason = "not allowed: " + err.Error()
		} else {
			// Errors are for classifyKey to explain.
			if key, _ := NormalizePrivateKey(b, nil); key != nil {
				clear(b)
				b = key
			}
			parameter, reason = classifyKey(b)
		}
		if reason != "" {
			clear(b)
			unusable = append(unusable, UnusableKey{f.path, reason})
			continue
		}
		keys.state.Usable++
		keys.Parameters[parameter] = append(keys.Parameters[parameter], b)
		switch parameter {
		case paramPrivateKeys:
			keys.Parameters[paramPasswords] = append(keys.Parameters[paramPasswords], nil)
		case paramPKCS11:
			keys.Parameters[paramPKCS11Config], _ = pkcs11Config()
		}
	}
	slices.SortFunc(unusable, func(a, b UnusableKey) int { return strings.Compare(a.Path, b.Path) })
	keys.state.Path, keys.state.Unusable = dir, unusable
	return keys
}

// read returns the content of the file. Whatever replaced the file meanwhile
// can neither block it nor make it read more than the file had.
func (f keyFile) read() ([]byte, error) {
	r, err := os.OpenFile(f.path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b := make([]byte, f.id.size)
	n, err := io.ReadFull(r, b)
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		err = nil
	}
	return b[:n], err
}
