package policy

import (
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// File is a policy that is read again when its file changes. It is safe for
// concurrent use.
type File struct {
	name    string
	issuers []string
	current atomic.Pointer[Policy]

	mu   sync.Mutex
	seen stamp // of what was read last, whether it could be used or not
}

type stamp struct {
	modified time.Time
	size     int64
	inode    uint64
}

// Open reads the policy in a file, as [Load] does. It has to be right at first.
func Open(name string, issuers []string) (*File, error) {
	f := &File{name: name, issuers: issuers}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.seen, _ = stampOf(name)
	p, err := Load(name, issuers)
	if err != nil {
		return nil, err
	}
	f.current.Store(p)
	return f, nil
}

// Fixed returns a policy that never changes.
func Fixed(p *Policy) *File {
	f := &File{}
	f.current.Store(p)
	return f
}

// Policy returns the policy that was read last and can be used.
func (f *File) Policy() *Policy { return f.current.Load() }

// Reload reads the file again, if it changed or always is true. One that can't
// be used is an error, and the policy stays what it was.
func (f *File) Reload(always bool) (changed bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.name == "" {
		return false, nil
	}
	now, err := stampOf(f.name)
	if err == nil && now == f.seen && !always {
		return false, nil
	}
	gone := f.seen == stamp{}
	f.seen = now
	if err != nil && gone && !always {
		return false, nil // it was said before
	}
	p, err := Load(f.name, f.issuers)
	if err != nil {
		return false, err
	}
	f.current.Store(p)
	return true, nil
}

func stampOf(name string) (stamp, error) {
	info, err := os.Stat(name)
	if err != nil {
		return stamp{}, err
	}
	s := stamp{modified: info.ModTime(), size: info.Size()}
	if sys, ok := info.Sys().(*syscall.Stat_t); ok {
		s.inode = sys.Ino
	}
	return s, nil
}
