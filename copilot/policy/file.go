package policy

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/ctrlplane/pilot/internal/filestamp"
)

// File is a policy that is read again when its file changes. It is safe for
// concurrent use.
type File struct {
	name    string
	issuers Issuers
	current atomic.Pointer[Policy]

	mu   sync.Mutex
	seen filestamp.Stamp // of what was read last, whether it could be used or not
}

// Open reads the policy in a file, as [Load] does. A policy that can't be used is an
// error.
func Open(name string, issuers Issuers) (*File, error) {
	f := &File{name: name, issuers: issuers}
	f.mu.Lock()
	defer f.mu.Unlock()
	var err error
	if f.seen, err = f.load(); err != nil {
		return nil, err
	}
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

// Reload reads the file again, if it changed or always is true, once it has not been
// written for half a second. A file that can't be used is an error, and the previous
// policy stays in force.
func (f *File) Reload(always bool) (changed bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.name == "" {
		return false, nil
	}
	now, err := filestamp.Of(f.name)
	if err == nil && now == f.seen && !always {
		return false, nil
	}
	gone := f.seen == filestamp.Stamp{}
	if err != nil && gone && !always {
		return false, nil // reported before
	}
	if f.seen, err = f.load(); err != nil {
		return false, err
	}
	return true, nil
}

// load reads the file once it is whole, and returns the stamp of what it read.
func (f *File) load() (filestamp.Stamp, error) {
	b, read, err := readWhole(f.name)
	if err != nil {
		return read, fmt.Errorf("policy: %w", err)
	}
	p, err := parse(f.name, b, f.issuers)
	if err != nil {
		return read, err
	}
	f.current.Store(p)
	return read, nil
}
