package mirror

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
)

// errCaller is the error of a caller that has gone, or that takes its answer too slowly.
var errCaller = errors.New("the caller does not read the answer")

// errSlow is the error of an answer that was ended since it was slow and others waited.
var errSlow = errors.New("the registry or the caller was too slow while others waited for their turn")

// answer is how a request is answered.
type answer struct {
	http.ResponseWriter
	stall    time.Duration           // for each write
	cancel   context.CancelCauseFunc // of the request's context
	registry string                  // that is asked, or ""
	status   int                     // 0 until the answer has begun

	since atomic.Int64 // when the write that is under way began, in Unix nanoseconds, or 0
	sent  atomic.Int64 // bytes of the body
	ended atomic.Bool  // no more is to be written
}

// work returns what needs a turn: the answer, with all that is asked of the registry for it.
func (a *answer) work() *work {
	return &work{registry: a.registry, moved: a.sent.Load, stalled: a.stalled, end: a.end}
}

// stalled returns for how long the write that is under way has waited for the caller.
func (a *answer) stalled() time.Duration {
	since := a.since.Load()
	if since == 0 || a.ended.Load() {
		return 0
	}
	return time.Since(time.Unix(0, since))
}

// end has writes fail from now on, also the one that is under way, and ends what is asked
// of the registry.
func (a *answer) end() {
	a.ended.Store(true)
	a.cancel(errSlow)
	_ = http.NewResponseController(a.ResponseWriter).SetWriteDeadline(time.Now())
}

// WriteHeader begins the answer.
func (a *answer) WriteHeader(status int) {
	if a.status == 0 {
		a.status = status
	}
	_ = a.setDeadline() // or Write fails
	a.ResponseWriter.WriteHeader(status)
}

func (a *answer) setDeadline() error {
	return http.NewResponseController(a.ResponseWriter).SetWriteDeadline(time.Now().Add(a.stall))
}

// Write writes a part of the body, within the time that the caller has for it.
func (a *answer) Write(p []byte) (int, error) {
	if a.status == 0 {
		a.status = http.StatusOK
	}
	if err := a.setDeadline(); err != nil {
		return 0, err
	}
	a.since.Store(time.Now().UnixNano())
	defer a.since.Store(0)
	if a.ended.Load() {
		return 0, errCaller
	}
	n, err := a.ResponseWriter.Write(p)
	a.sent.Add(int64(n))
	if err != nil {
		err = fmt.Errorf("%w: %w", errCaller, err)
	}
	return n, err
}

// code returns the status as a label.
func (a *answer) code() string {
	if a.status == 0 {
		return "none"
	}
	return strconv.Itoa(a.status)
}

// head sets the headers of a manifest, a blob or a list.
func (a *answer) head(mediaType string, d digest.Digest, size int64) {
	h := a.Header()
	h.Set("Content-Type", mediaType)
	h.Set("Content-Length", strconv.FormatInt(size, 10))
	if d != "" {
		h.Set("Docker-Content-Digest", d.String())
	}
}

// json answers with a document.
func (a *answer) json(mediaType string, doc []byte) {
	a.head(mediaType, "", int64(len(doc)))
	// The caller may be gone.
	_, _ = a.Write(doc)
}

// refuse answers with an error in the form of the distribution specification:
// https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md#error-codes.
func (a *answer) refuse(status int, code, message string) {
	type problem struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	doc, err := json.Marshal(map[string][]problem{"errors": {{code, message}}})
	if err != nil {
		panic(err) // strings
	}
	for _, name := range []string{"Docker-Content-Digest", "Content-Length"} {
		a.Header().Del(name)
	}
	a.head("application/json", "", int64(len(doc)))
	a.WriteHeader(status)
	_, _ = a.Write(doc)
}
