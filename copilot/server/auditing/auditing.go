// Package auditing decides which lines of the audit log the broker's requests get: one
// for each use of a KEK, before it is answered, and a few for many refusals.
package auditing

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/policy"
	"github.com/ctrlplane/pilot/copilot/server/caller"
)

// Entry is the line of a request that is being handled.
type Entry struct {
	audit.Entry
	// Caller is the principal whose identity is in Who.
	Caller policy.Principal
	// Stranger reports that the caller has a token, and that no rule names it. There may
	// be any number of those.
	Stranger bool

	written bool // as done
}

// Changed makes [Log.Request] write a line again that [Log.WriteAhead] has written.
func (e *Entry) Changed() { e.written = false }

// Written reports whether the line was written ahead, and has not changed since.
func (e *Entry) Written() bool { return e.written }

// Log writes the lines of requests to an audit log that is opened later. Until then it
// writes nothing. It is safe for concurrent use.
type Log struct {
	to       atomic.Pointer[audit.Log]
	refusals refusals
}

// New returns a Log that is not open.
func New() *Log {
	l := &Log{}
	l.refusals.write = l.Write
	return l
}

// Open has l write to an audit log.
func (l *Log) Open(to *audit.Log) { l.to.Store(to) }

// Write writes a line, and returns once it is on disk. Errors wrap
// [audit.ErrUnavailable].
func (l *Log) Write(e audit.Entry) error {
	to := l.to.Load()
	if to == nil {
		return nil
	}
	return to.Write(e)
}

// WriteAhead writes the line of a request right before its change is made.
func (l *Log) WriteAhead(e *Entry) error {
	if err := l.Write(e.Entry); err != nil {
		return err
	}
	e.written = true
	return nil
}

// Request writes the line of a request that was handled with an error, or nil. A refused
// one may be summed up with others instead. Many says that its kind always comes in
// numbers, as of callers over their limit.
func (l *Log) Request(ctx context.Context, e *Entry, err error, many bool) error {
	if e.written && err == nil {
		return nil
	}
	if !e.written && err != nil {
		who := e.Who
		if who == caller.Anonymous || e.Stranger {
			who = caller.Network(e.From)
			if user := caller.User(ctx); user != "" {
				who = "from " + user
			}
		}
		if !l.refusals.note(who, e.Entry, many) {
			return nil
		}
	}
	return l.Write(e.Entry)
}

// Connection writes the line of a connection that failed before its first request, and
// reports whether it did: it may be summed up with others instead, which are those of
// one network, or all with the same reason if there are many.
func (l *Log) Connection(e audit.Entry, many bool) (written bool, err error) {
	who := caller.Network(e.From)
	if many {
		who = e.Reason
	}
	if !l.refusals.note(who, e, many) {
		return false, nil
	}
	return true, l.Write(e)
}

// Run writes the sums of refusals that are due, until ctx is done.
func (l *Log) Run(ctx context.Context) { l.refusals.run(ctx) }

// Flush writes all sums.
func (l *Log) Flush() { l.refusals.look(time.Now(), true) }
