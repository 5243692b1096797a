package keyjson

import (
	"io"
	"sync"
)

// Body is the body of an HTTP request, which holds a key. It can be cleared while
// a connection, which outlives the request, still reads it: what is left to read
// then is zeros.
type Body struct {
	mu    sync.Mutex
	bytes []byte
}

// NewBody returns a body with those bytes, which are its own from then on.
func NewBody(b []byte) *Body { return &Body{bytes: b} }

// Clear clears the body.
func (b *Body) Clear() {
	b.mu.Lock()
	defer b.mu.Unlock()
	clear(b.bytes)
}

// Len returns the number of bytes.
func (b *Body) Len() int { return len(b.bytes) }

// Reader returns a reader of the whole body.
func (b *Body) Reader() io.ReadCloser { return io.NopCloser(&bodyReader{body: b}) }

type bodyReader struct {
	body *Body
	read int // bytes so far
}

func (r *bodyReader) Read(p []byte) (int, error) {
	r.body.mu.Lock()
	defer r.body.mu.Unlock()
	if r.read == len(r.body.bytes) {
		return 0, io.EOF
	}
	n := copy(p, r.body.bytes[r.read:])
	r.read += n
	return n, nil
}
