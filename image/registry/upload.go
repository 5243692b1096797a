package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/ctrlplane/pilot/internal/ingest"
)

const (
	// chunkSize is how many bytes of a blob are sent in one request, and kept until
	// the registry has them: what object stores want at the least.
	chunkSize = 5 << 20
	// maxChunk bounds the chunks that a registry may ask for.
	maxChunk = 32 << 20
	// chunkWithin bounds one request with a chunk: 70 kB a second.
	chunkWithin = 2 * time.Minute
	// abortWithin bounds the request that has the registry forget an upload.
	abortWithin = 5 * time.Second
)

// streamWithin bounds the wait for a registry to take a part of a blob that is sent in
// one request, and for its answer. Tests shorten it.
var streamWithin = chunkWithin

var errNotTaken = errors.New("the registry takes no more of a blob, and does not answer")

// upload sends a blob whose digest is known at its end, as a [content.Writer]. What
// does not fit into one chunk is sent chunk by chunk, and a chunk that did not arrive
// is sent again from where the registry says that it stopped:
// https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md#pushing-a-blob-in-chunks.
type upload struct {
	ingest.Blob
	ctx      context.Context
	repo     *Repository
	location *url.URL // nil until the upload has begun
	chunk    []byte   // what the registry does not have yet
	size     int      // of a chunk
	sent     int64
	stream   *stream // of a registry that takes no chunks
	err      error
	ended    bool
}

func newUpload(ctx context.Context, repo *Repository, ref string, size int64) *upload {
	room := int64(chunkSize)
	if size > 0 {
		room = min(room, size)
	}
	return &upload{Blob: ingest.New(ref, size), ctx: ctx, repo: repo, size: chunkSize, chunk: make([]byte, 0, room)}
}

func (u *upload) Write(p []byte) (int, error) {
	if u.ended {
		return 0, errors.New("the upload has ended")
	}
	n := 0
	for u.err == nil && len(p) > 0 {
		if len(u.chunk) == u.size {
			u.err = u.flush()
			continue
		}
		part := p[:min(len(p), u.size-len(u.chunk))]
		u.Add(part)
		if u.stream != nil {
			_, u.err = u.stream.Write(part)
			u.sent += int64(len(part))
		} else {
			u.chunk = append(u.chunk, part...)
		}
		n, p = n+len(part), p[len(part):]
	}
	return n, u.err
}

// begin asks the registry for a place to send the blob to.
func (u *upload) begin() error {
	resp, err := u.repo.push.do(u.ctx, request{
		method: http.MethodPost, url: u.repo.push.url(nil, "blobs", "uploads/"), header: http.Header{"Content-Length": {"0"}},
	}, http.StatusAccepted)
	if err != nil {
		return fmt.Errorf("start the upload of a blob: %w", err)
	}
	return u.goesOnAt(resp)
}

func (u *upload) goesOnAt(resp *http.Response) error {
	location, err := resp.Request.URL.Parse(resp.Header.Get("Location"))
	if err != nil || resp.Header.Get("Location") == "" {
		return fmt.Errorf("%s does not say where to send the blob to (Location: %q)", resp.Request.URL.Host, resp.Header.Get("Location"))
	}
	u.location = location
	if least, err := strconv.Atoi(resp.Header.Get("OCI-Chunk-Min-Length")); err == nil && least > u.size {
		if least > maxChunk {
			return fmt.Errorf("%s wants chunks of %d bytes, more than %d", resp.Request.URL.Host, least, maxChunk)
		}
		u.size = least
	}
	return nil
}

// flush sends the chunk.
func (u *upload) flush() error {
	if u.location == nil {
		if err := u.begin(); err != nil {
			return err
		}
		if len(u.chunk) < u.size {
			return nil // it wants more at once
		}
	}
	return u.sendChunk()
}

func (u *upload) sendChunk() error {
	rest := u.chunk
	var first error
	for n := 1; len(rest) > 0; n++ {
		resp, err := u.repo.push.do(u.ctx, request{
			method: http.MethodPatch, url: u.location, body: rest, once: true, within: chunkWithin,
			header: http.Header{
				"Content-Type":  {"application/octet-stream"},
				"Content-Range": {fmt.Sprintf("%d-%d", u.sent, u.sent+int64(len(rest))-1)},
			},
		}, http.StatusAccepted, http.StatusCreated, http.StatusNoContent)
		if err == nil {
			u.sent += int64(len(rest))
			u.chunk = u.chunk[:0]
			return u.goesOnAt(resp)
		}
		if u.ctx.Err() != nil {
			return err
		}
		if u.sent == 0 && takesNoChunks(err) {
			return u.streamFrom(rest)
		}
		// A registry whose disk is full may say that once, and then that the offset is wrong.
		if first == nil {
			first = err
		} else if statusOf(err) != statusOf(first) {
			err = fmt.Errorf("%w (before that: %w)", err, first)
		}
		if n == attempts {
			return fmt.Errorf("send bytes %d to %d of a blob: %w", u.sent, u.sent+int64(len(rest))-1, err)
		}
		if err := pause(u.ctx, n, nil); err != nil {
			return err
		}
		arrived, serr := u.arrived()
		switch {
		case statusOf(serr) >= 400 && statusOf(serr) != http.StatusNotFound:
			// It can't say. If it has the chunk, it refuses it now, and at worst the
			// digest does not match in the end.
		case serr != nil:
			return fmt.Errorf("send bytes %d to %d of a blob: %w", u.sent, u.sent+int64(len(rest))-1, errors.Join(err, serr))
		case arrived < u.sent || arrived > u.sent+int64(len(rest)):
			return fmt.Errorf("the registry has %d bytes of a blob of which it took %d: %w", arrived, u.sent, err)
		default:
			rest = rest[arrived-u.sent:]
			u.sent = arrived
		}
	}
	u.chunk = u.chunk[:0]
	return nil
}

// arrived asks how many bytes the registry has.
func (u *upload) arrived() (int64, error) {
	resp, err := u.repo.push.do(u.ctx, request{method: http.MethodGet, url: u.location}, http.StatusNoContent, http.StatusAccepted, http.StatusOK)
	if err != nil {
		return 0, err
	}
	if resp.Header.Get("Location") != "" {
		if err := u.goesOnAt(resp); err != nil {
			return 0, err
		}
	}
	// An empty upload has the range 0-0, as one of a single byte has; what was sent
	// before distinguishes them.
	_, last, ok := strings.Cut(strings.TrimPrefix(resp.Header.Get("Range"), "bytes="), "-")
	n, err := strconv.ParseInt(last, 10, 64)
	if !ok || err != nil {
		return 0, fmt.Errorf("it does not say what it has (Range: %q)", resp.Header.Get("Range"))
	}
	if n == 0 {
		return u.sent, nil
	}
	return n + 1, nil
}

func (u *upload) Commit(ctx context.Context, size int64, expected digest.Digest, opts ...content.Opt) error {
	if u.ended {
		return errors.New("the upload has ended")
	}
	if u.err != nil {
		return u.err
	}
	if err := u.Check(size, expected); err != nil {
		return err
	}
	d := u.Digest()
	if u.stream != nil {
		resp, err := u.stream.end()
		if err != nil {
			return err
		}
		if err := u.goesOnAt(resp); err != nil {
			return err
		}
	}
	if u.location == nil {
		if err := u.begin(); err != nil {
			return err
		}
	} else if len(u.chunk) > 0 {
		if err := u.sendChunk(); err != nil {
			return err
		}
	}
	location := *u.location
	query := location.Query()
	query.Set("digest", d.String())
	location.RawQuery = query.Encode()
	resp, err := u.repo.push.do(u.ctx, request{
		method: http.MethodPut, url: &location, body: u.chunk, within: chunkWithin,
		header: http.Header{"Content-Type": {"application/octet-stream"}},
	}, http.StatusCreated, http.StatusNoContent, http.StatusOK)
	if err != nil {
		// It may have been done, and the answer lost.
		if here, herr := u.repo.hasBlob(u.ctx, u.repo.push, d); herr != nil || !here {
			return fmt.Errorf("finish the upload of %s: %w", d, err)
		}
	} else if got := resp.Header.Get("Docker-Content-Digest"); got != "" && got != d.String() {
		return fmt.Errorf("%s keeps the blob %s as %s", resp.Request.URL.Host, d, got)
	}
	u.ended = true
	u.repo.note(d, u.Written())
	return nil
}

func (u *upload) Truncate(int64) error {
	return fmt.Errorf("an upload can't begin again: %w", errdefs.ErrNotImplemented)
}

// Close has the registry forget an upload that was not committed.
func (u *upload) Close() error {
	u.chunk = nil
	if u.ended {
		return nil
	}
	u.ended = true
	if u.stream != nil {
		u.stream.abort()
	}
	u.forget()
	return nil
}

// forget has the registry forget what it has of the upload.
func (u *upload) forget() {
	if u.location == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(u.ctx), abortWithin)
	defer cancel()
	// Registries that can't do it forget uploads after a while.
	_, _ = u.repo.push.do(ctx, request{method: http.MethodDelete, url: u.location, once: true}, http.StatusNoContent, http.StatusAccepted, http.StatusNotFound)
	u.location = nil
}

// takesNoChunks reports whether a registry refused the first chunk as such. Then it
// gets the blob as "docker push" sends it, in one request of unknown length.
func takesNoChunks(err error) bool {
	switch statusOf(err) {
	case http.StatusBadRequest, http.StatusMethodNotAllowed, http.StatusLengthRequired, http.StatusRequestEntityTooLarge,
		http.StatusUnsupportedMediaType, http.StatusRequestedRangeNotSatisfiable, http.StatusNotImplemented:
		return true
	}
	return false
}

// stream is one request that sends the rest of a blob.
type stream struct {
	*io.PipeWriter
	ctx    context.Context
	cancel context.CancelCauseFunc
	answer chan streamAnswer
}

type streamAnswer struct {
	*http.Response
	err error
}

// streamFrom starts over with a request that sends first and what is written later.
func (u *upload) streamFrom(first []byte) error {
	u.forget()
	if err := u.begin(); err != nil {
		return err
	}
	pr, pw := io.Pipe()
	ctx, cancel := context.WithCancelCause(u.ctx)
	s := &stream{pw, ctx, cancel, make(chan streamAnswer, 1)}
	header := http.Header{"Content-Type": {"application/octet-stream"}}
	go func() {
		resp, err := u.repo.push.send(ctx, http.MethodPatch, u.location, header, pr, -1)
		if err == nil {
			defer resp.Body.Close()
			if !slices.Contains([]int{http.StatusAccepted, http.StatusCreated, http.StatusNoContent}, resp.StatusCode) {
				err = plainly(u.repo.push.Host, statusError(resp))
			}
		}
		if err != nil {
			err = fmt.Errorf("send a blob in one request, since the registry takes no chunks: %w", err)
			pr.CloseWithError(err)
		}
		s.answer <- streamAnswer{resp, err}
	}()
	u.stream = s
	_, err := s.Write(first)
	u.sent, u.chunk = int64(len(first)), u.chunk[:0]
	return err
}

// Write sends a part of the blob.
func (s *stream) Write(p []byte) (int, error) {
	timer := s.stalls()
	defer timer.Stop()
	n, err := s.PipeWriter.Write(p)
	return n, s.why(err)
}

// stalls ends the request after a while, unless the timer is stopped.
func (s *stream) stalls() *time.Timer {
	return time.AfterFunc(streamWithin, func() { s.cancel(errNotTaken) })
}

// why returns the cause of an error of a request that was ended.
func (s *stream) why(err error) error {
	if cause := context.Cause(s.ctx); err != nil && cause != nil {
		return cause
	}
	return err
}

func (s *stream) end() (*http.Response, error) {
	if err := s.PipeWriter.Close(); err != nil {
		return nil, err
	}
	timer := s.stalls()
	defer timer.Stop()
	a := <-s.answer
	err := s.why(a.err)
	s.cancel(nil)
	return a.Response, err
}

func (s *stream) abort() {
	s.cancel(context.Canceled)
	s.PipeWriter.CloseWithError(context.Canceled)
}
