package copilot

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"
)

// Verdicts of an audit entry.
const (
	verdictAllowed = "allowed" // and done
	verdictDenied  = "denied"  // the caller may not, or there is no such KEK
	verdictFailed  = "failed"  // the request or the broker was at fault
)

// Entry is one line of the audit log. It never holds key material.
type Entry struct {
	Time    time.Time `json:"time"`
	Request string    `json:"request"` // its id, also in the X-Request-Id header
	Action  string    `json:"action"`  // export, wrap, unwrap, info, list, create, import, rotate, delete, other
	KEK     string    `json:"kek,omitempty"`
	Version int       `json:"version,omitempty"`
	Who     string    `json:"who"`
	From    string    `json:"from"`
	Verdict string    `json:"verdict"`
	Status  int       `json:"status,omitempty"` // HTTP
	Reason  string    `json:"reason,omitempty"`

	written bool // as what was done, which may yet fail
}

// errNoAudit is the error of a request that is refused because it can't be
// written down.
var errNoAudit = errors.New("the request can't be audited")

// before writes e down as done, with the version that there will be, right
// before a change to the store is made.
func (l *AuditLog) before(e *Entry) func(Info) error {
	return func(info Info) error {
		e.Version = info.Version
		if err := l.Write(*e); err != nil {
			return fmt.Errorf("%w: %w", errNoAudit, err)
		}
		e.written = true
		return nil
	}
}

// maxAuditText bounds what a caller can write into one field, in bytes.
const maxAuditText = 512

// AuditLog writes one line of JSON for each request.
type AuditLog struct {
	mu   sync.Mutex
	file *os.File
}

// OpenAuditLog appends to the file named name, of mode 0600, or writes to
// standard output if name is "-".
func OpenAuditLog(name string) (*AuditLog, error) {
	if name == "-" {
		return &AuditLog{file: os.Stdout}, nil
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("audit log: %w", err)
	}
	return &AuditLog{file: f}, nil
}

// Write writes e, with the current time, in one piece. What follows a line
// that could be written only in part starts on a line of its own.
func (l *AuditLog) Write(e Entry) error {
	e.Time = time.Now().UTC()
	e.KEK, e.Who, e.From, e.Reason = bounded(e.KEK), bounded(e.Who), bounded(e.From), bounded(e.Reason)
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	n, err := l.file.Write(append(b, '\n'))
	if err != nil {
		if n > 0 {
			l.file.Write([]byte("\n"))
		}
		return fmt.Errorf("audit log: %w", err)
	}
	return nil
}

// Close closes the file.
func (l *AuditLog) Close() error { return l.file.Close() }

func bounded(s string) string {
	if len(s) > maxAuditText {
		return strings.ToValidUTF8(s[:maxAuditText], "") + "…"
	}
	return s
}
