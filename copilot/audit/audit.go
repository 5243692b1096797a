// Package audit keeps the broker's audit log: a line of JSON for each request, each
// chained to the previous one by a keyed hash, so that a changed, removed or inserted
// line is detected.
package audit

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
)

// Verdicts of an entry.
const (
	Allowed = "allowed" // and done
	Denied  = "denied"  // the caller may not, or there is no such KEK
	Failed  = "failed"  // the request or the broker was at fault
)

// Entry is one line of the log. It never holds key material.
type Entry struct {
	Time    time.Time `json:"time"`
	Request string    `json:"request,omitempty"` // its id, also in the X-Request-Id header
	Trace   string    `json:"trace,omitempty"`   // the OpenTelemetry trace that it belongs to
	Action  string    `json:"action"`            // export, wrap, unwrap, info, list, create, import, rotate, …
	KEK     string    `json:"kek,omitempty"`
	Version int       `json:"version,omitempty"`
	Subject string    `json:"subject,omitempty"` // whom a revocation is about
	Who     string    `json:"who"`
	// Workload is the one that the caller vouches for, NAMESPACE/SERVICEACCOUNT.
	Workload string `json:"workload,omitempty"`
	// Labels are those of the workload's pod that rules are about.
	Labels map[string]string `json:"labels,omitempty"`
	// Claims are some of those of the caller's token, which say which CI job it is of.
	Claims  map[string]string `json:"claims,omitempty"`
	From    string            `json:"from"`
	Verdict string            `json:"verdict"`
	Status  int               `json:"status,omitempty"` // HTTP
	Reason  string            `json:"reason,omitempty"`
	// Generation is how often the store had been changed at least, which the log adds.
	Generation int64 `json:"generation,omitempty"`
	// Approval is the request of one admin that another one has approved.
	Approval string `json:"approval,omitempty"`
	// Count is how many requests like this one were refused from Since on, up to
	// this one, that have no line of their own. It is 0 in the line of a request.
	Count int64     `json:"count,omitempty"`
	Since time.Time `json:"since,omitzero"`

	shown bool // its fields are as a line has them
}

// ErrUnavailable is the error of an entry that could not be written.
var ErrUnavailable = errors.New("the audit log can't be written")

// errDatabase is the error of a log in a database.
var errDatabase = errors.New("its database failed")

// Cause says in a few words why an entry could not be written, or returns "". It
// names no path and no address.
func Cause(err error) string {
	var errno syscall.Errno
	switch {
	case errors.Is(err, errDatabase):
		return errDatabase.Error()
	case errors.As(err, &errno):
		return errno.Error()
	}
	return ""
}

// Key is what entries are authenticated with: 32 bytes, which the writer
// of the log has, and its verifier.
type Key []byte

// line is how an entry is written, without its MAC, which follows as the last
// member: base64 of HMAC-SHA-256 over the JSON without it.
type line struct {
	Chain string `json:"chain"`          // of the log's file, or of one run of a broker
	Seq   int64  `json:"seq"`            // from 1
	Prev  string `json:"prev,omitempty"` // the MAC of the line before
	// After is, in the first line of a chain, a line that was there before:
	// to hide that that one's chain was removed, this one has to be removed, too.
	After string `json:"after,omitempty"`
	Entry
}

const (
	macMember = `,"mac":"`
	macEnd    = `"}`
)

var encoding = base64.RawURLEncoding

func (k Key) mac(b []byte) string {
	h := hmac.New(sha256.New, k)
	h.Write(b)
	return encoding.EncodeToString(h.Sum(nil))
}

// seal returns the line with its MAC.
func (k Key) seal(l line) (sealed []byte, mac string, err error) {
	// Without escapes for HTML, which would make a line six times as long.
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(false)
	if err := e.Encode(l); err != nil {
		return nil, "", err
	}
	b := bytes.TrimSuffix(text.Bytes(), []byte("\n"))
	mac = k.mac(b)
	b = append(b[:len(b)-1], macMember...)
	return append(append(b, mac...), macEnd...), mac, nil
}

// sink is where lines go. After a failed append, either no line was written, or the
// next call of head returns the last one that was.
type sink interface {
	// append writes whole lines, without newlines, of which the first has
	// the number seq.
	append(chain string, seq int64, lines [][]byte) error
	// head returns the last line of the chain, or of all if chain is empty, or
	// nil if there is none.
	head(key Key, chain string) ([]byte, error)
	// missing returns the lines of known that are absent, or differ.
	missing(ctx context.Context, key Key, known []Head) ([]Head, error)
	Close() error
}

// Log is an audit log. It is safe for concurrent use.
type Log struct {
	key  Key
	sink sink
	// generation returns how often the store was changed. It may be nil.
	generation atomic.Pointer[func() int64]
	counted    atomic.Int64 // by the last line that was written, or that was there

	mu      sync.Mutex
	turn    sync.Cond // something below changed
	queue   []*waiting
	writing bool // a goroutine is writing, and owns at and unsure
	closed  bool

	failed bool // the last entry could not be written
	head   Head // the last line that is on disk
	losses int  // how often lines were found missing
	ended  Head // the known line that this log's chain began after, since it was lost

	at     Head
	first  *Entry // is written before the next entry
	after  string // for the first line
	unsure bool   // what of the last lines the sink has taken
}

type waiting struct {
	entry Entry
	done  bool
	err   error
}

// Head identifies one line of a chain.
type Head struct {
	Chain string `json:"chain"`
	Seq   int64  `json:"seq"`
	MAC   string `json:"mac"`
}

func (h Head) String() string { return fmt.Sprintf("%s/%d/%s", h.Chain, h.Seq, h.MAC) }

// ParseHead reads what [Head.String] wrote.
func ParseHead(s string) (h Head, err error) {
	parts := strings.Split(s, "/")
	if len(parts) == 3 {
		h.Chain, h.MAC = parts[0], parts[2]
		_, err = fmt.Sscanf(parts[1], "%d", &h.Seq)
	}
	if len(parts) != 3 || err != nil || h.Seq < 1 || h.Chain == "" || h.MAC == "" {
		return Head{}, fmt.Errorf("%.80q is not a line of an audit log, which looks like 6f1c…/1234/Jd3k…", s)
	}
	return h, nil
}

const (
	// maxBatch is how many entries are written together, if that many wait.
	maxBatch = 256
	// maxLine bounds a line, in bytes.
	maxLine = 16 << 10
)

// Count has each line say how often the store was changed. No line says less than one
// before it.
func (l *Log) Count(generation func() int64) { l.generation.Store(&generation) }

// Counted returns how often the store had been changed by the last line, also of those that
// were there when the log was opened, or 0.
func (l *Log) Counted() int64 { return l.counted.Load() }

// claims notes how often the store had been changed by a line.
func (l *Log) claims(generation int64) { l.counted.Store(max(l.counted.Load(), generation)) }

// Head returns the last line that is on disk. Its number is 0 if there is none.
func (l *Log) Head() Head {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.head
}

// Ended returns the known line that was missing when the log was opened, and that its
// first line names. Its number is 0 if none was.
func (l *Log) Ended() Head { return l.ended }

// Losses returns how often lines were found missing.
func (l *Log) Losses() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.losses
}

// last returns the last line that the sink has, of a chain or of all.
func (l *Log) last(chain string) (Head, error) {
	text, err := l.sink.head(l.key, chain)
	if err != nil || text == nil {
		return Head{}, err
	}
	read, mac, err := l.key.open(text)
	if err != nil {
		return Head{}, fmt.Errorf("the last line of the audit log: %w", err)
	}
	l.claims(read.Generation)
	return Head{read.Chain, read.Seq, mac}, nil
}

// Missing returns those of known, which are the last lines of chains, that the log does
// not have, nor a file that logrotate has moved away.
func (l *Log) Missing(ctx context.Context, known []Head) ([]Head, error) {
	return l.sink.missing(ctx, l.key, known)
}

// Write writes an entry, with the current time, and returns once it is on
// disk. Entries of concurrent callers are written together. Errors wrap
// [ErrUnavailable].
func (l *Log) Write(e Entry) error {
	e.Time = time.Now().UTC()
	e.bound()
	w := &waiting{entry: e}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.queue = append(l.queue, w)
	for !w.done {
		switch {
		case l.closed:
			return fmt.Errorf("%w: the audit log is closed", ErrUnavailable)
		case l.writing:
			l.turn.Wait()
		default:
			l.writeQueue()
		}
	}
	return w.err
}

// writeQueue writes the entries that wait, up to a bound. Its caller holds l.mu, which
// it releases while it writes.
func (l *Log) writeQueue() {
	n := min(len(l.queue), maxBatch)
	batch := l.queue[:n:n]
	l.queue, l.writing = l.queue[n:], true
	l.mu.Unlock()
	err := l.write(batch)
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	l.mu.Lock()
	l.writing, l.failed = false, err != nil
	if err == nil {
		l.head = l.at
	}
	for _, w := range batch {
		w.done, w.err = true, err
	}
	l.turn.Broadcast()
}

func (l *Log) write(batch []*waiting) error {
	if l.unsure {
		last, err := l.last(l.at.Chain)
		if err != nil {
			return err
		}
		// A file may end in another chain: the first line of this one was not written.
		if last.Chain == l.at.Chain && last.Seq > l.at.Seq {
			l.at = last
		}
		l.unsure = false
	}
	if f, ok := l.sink.(*file); ok {
		if how := f.lost(); how != "" {
			logrus.WithField("file", f.name).Error("audit log: " + how + ": its lines go on in a new file")
			if err := f.reopen(); err != nil {
				return err
			}
			// The chain goes on, so the lines before are missed.
			e := continued(how)
			l.first = &e
			l.mu.Lock()
			l.losses++
			l.mu.Unlock()
		}
	}
	if l.first != nil {
		batch = append([]*waiting{{entry: *l.first}}, batch...)
	}
	at := l.at
	lines := make([][]byte, len(batch))
	counted := l.counted.Load()
	if g := l.generation.Load(); g != nil {
		counted = max(counted, (*g)())
	}
	for i, w := range batch {
		next := line{Chain: at.Chain, Seq: at.Seq + 1, Prev: at.MAC, Entry: w.entry}
		next.Generation = counted
		if next.Seq == 1 {
			next.After = l.after
		}
		text, mac, err := l.key.seal(next)
		if err != nil {
			return err
		}
		lines[i], at.Seq, at.MAC = text, at.Seq+1, mac
	}
	if err := l.sink.append(at.Chain, l.at.Seq+1, lines); err != nil {
		l.unsure = true
		return err
	}
	l.at, l.first = at, nil
	l.claims(counted)
	return nil
}

// Ready reports why entries can't be written. If the last one could not, it tries to
// write one that says so: nothing else is written while no request is let in.
func (l *Log) Ready() error {
	l.mu.Lock()
	failed := l.failed
	l.mu.Unlock()
	if !failed {
		return nil
	}
	return l.Write(Entry{Action: "resume", Who: "copilot", From: "copilot", Verdict: Allowed, Reason: "the log can be written again"})
}

// Close closes the log once what is being written has been.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.writing {
		l.turn.Wait()
	}
	if l.closed {
		return nil
	}
	l.closed = true
	l.turn.Broadcast()
	return l.sink.Close()
}

// Reopen continues a log in a file in a new file of the same name, such as after the
// old one was moved away. The first line there chains it to the old one. It does
// nothing to other logs.
func (l *Log) Reopen() error {
	changed, err := l.reopen()
	if err == nil && changed {
		err = l.Write(continued("the log goes on in a new file"))
	}
	return err
}

// continued returns the first entry in a new file.
func continued(reason string) Entry {
	return Entry{Time: time.Now().UTC(), Action: "continue", Who: "copilot", From: "copilot", Verdict: Allowed, Reason: reason}
}

func (l *Log) reopen() (changed bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.writing {
		l.turn.Wait()
	}
	f, ok := l.sink.(*file)
	if !ok || l.closed {
		return false, nil
	}
	before := f.f
	err = f.reopen()
	return f.f != before, err
}
