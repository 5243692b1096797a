package processor

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"

	"github.com/opencontainers/go-digest"
)

// Encrypter encrypts a layer as it is read. It is not safe for concurrent use.
type Encrypter struct{ stream *stream }

// NewEncrypter returns a reader of the ciphertext of the layer that r reads,
// of equal length, under k, which has to be new: see [NewLayerKey]. Once the
// Encrypter reports [io.EOF], k is complete. Callers that stop before EOF or an
// error must call Close.
func NewEncrypter(r io.Reader, k *LayerKey) (*Encrypter, error) {
	if k.mac != nil {
		return nil, errors.New("the layer key has encrypted a layer already")
	}
	s, err := newStream(r, k)
	if err != nil {
		return nil, err
	}
	s.prepare = func(b []byte) { s.ctr.XORKeyStream(b, b) }
	s.end = func(mac []byte) error {
		k.mac = mac
		return io.EOF
	}
	s.next = s.receive
	return &Encrypter{s}, nil
}

// Read reads up to len(p) bytes of ciphertext.
func (e *Encrypter) Read(p []byte) (int, error) { return e.stream.read(p) }

// WriteTo writes the ciphertext to w, in writes of up to [BufferSize] bytes, and returns
// the number of bytes written.
func (e *Encrypter) WriteTo(w io.Writer) (int64, error) { return e.stream.writeTo(w) }

// Close stops reading the layer and waits until nothing reads it any more. It may be
// called while another goroutine reads from e, which then gets an error.
func (e *Encrypter) Close() error { return e.stream.shut() }

// Decrypter decrypts a layer as it is read. It is not safe for concurrent use.
type Decrypter struct {
	stream  *stream
	verdict verdict
}

// NewDecrypter returns a reader of the plain layer whose ciphertext r reads.
// It reports [io.EOF], and WriteTo no error, only once the HMAC of the whole layer
// is verified, and [ErrTampered] otherwise. What it returns before that is not
// authenticated yet; the last [BufferSize] bytes of its input it holds back until
// they are. Callers that stop before EOF or an error must call Close.
func NewDecrypter(r io.Reader, k *LayerKey) (*Decrypter, error) {
	if len(k.mac) != sha256.Size {
		return nil, errors.New("the layer key has no HMAC")
	}
	s, err := newStream(r, k)
	if err != nil {
		return nil, err
	}
	d := &Decrypter{stream: s, verdict: verdict{stream: s, want: k.mac}}
	s.end, s.next = d.verdict.judge, d.verdict.next
	return d, nil
}

// Read reads up to len(p) bytes of the plain layer.
func (d *Decrypter) Read(p []byte) (int, error) { return d.stream.read(p) }

// WriteTo writes the plain layer to w, in writes of up to [BufferSize] bytes, and returns
// the number of bytes written. Its error is nil only if the whole layer is authentic.
func (d *Decrypter) WriteTo(w io.Writer) (int64, error) { return d.stream.writeTo(w) }

// HashPlain has d compute the digest of the plain layer as well: see [Decrypter.PlainDigest].
// It must be called before anything is read.
func (d *Decrypter) HashPlain() {
	d.stream.plain, d.stream.used = sha256.New(), make(chan chunk, chunks)
}

// PlainDigest returns the SHA-256 of the plain layer, or "" unless all of it was read, is
// authentic, and [Decrypter.HashPlain] was called before.
func (d *Decrypter) PlainDigest() digest.Digest {
	if s := d.stream; s.ready.err == io.EOF && len(s.ready.b) == 0 {
		s.endHash()
		return s.sum
	}
	return ""
}

// Close stops reading the layer and waits until nothing reads it any more. It may be
// called while another goroutine reads from d, which then gets an error.
func (d *Decrypter) Close() error { return d.stream.shut() }

// chunks is how many buffers of BufferSize bytes a stream has at most: one
// that is read into, one that is authenticated, one that is held back, one
// that is handed out, and two on their way, so that the MAC never waits.
const chunks = 6

// buffers are those that no stream uses now.
var buffers = sync.Pool{New: func() any { return new([BufferSize]byte) }}

// chunk is a piece of a layer.
type chunk struct {
	b      []byte
	whole  []byte            // b before some of it was handed out
	buffer *[BufferSize]byte // that b is in
	err    error             // what comes after b: nil for more, io.EOF, or what went wrong
}

// stream is what both directions share: the cipher and the MAC, keyed alike, a
// pipeline of two goroutines, one of which reads and one computes the MAC, which
// takes longest, and how the result is handed out.
type stream struct {
	src     io.Reader
	ctr     cipher.Stream
	mac     hash.Hash
	prepare func([]byte)           // applied to what was read before its MAC is computed; may be nil
	end     func(mac []byte) error // how a layer with this MAC ends: io.EOF or an error
	next    func() chunk           // the next to hand out, made from what is received
	ready   chunk                  // handed out now
	plain   hash.Hash              // of all that is handed out; nil: it is not computed
	used    chan chunk             // that were handed out, and are to be hashed
	hashing sync.WaitGroup         // until all are
	hashed  bool                   // used is closed
	sum     digest.Digest          // of all that was handed out, once that is the whole

	start sync.Once
	out   chan chunk
	free  chan *[BufferSize]byte // buffers to be used again
	close sync.Once
	stop  chan struct{}
	done  sync.WaitGroup
}

func newStream(r io.Reader, k *LayerKey) (*stream, error) {
	block, err := aes.NewCipher(k.key)
	if err != nil {
		return nil, err
	}
	return &stream{
		src: r, ctr: cipher.NewCTR(block, k.nonce), mac: hmac.New(sha256.New, k.key),
		out: make(chan chunk, chunks), free: make(chan *[BufferSize]byte, chunks), stop: make(chan struct{}),
	}, nil
}

var errClosed = errors.New("the layer was closed")

func (s *stream) read(p []byte) (int, error) {
	if err := s.fill(); err != nil {
		return 0, err
	}
	n := copy(p, s.ready.b)
	s.ready.b = s.ready.b[n:]
	return n, nil
}

func (s *stream) writeTo(w io.Writer) (total int64, err error) {
	for {
		if err := s.fill(); err == io.EOF {
			return total, nil
		} else if err != nil {
			return total, err
		}
		n, err := w.Write(s.ready.b)
		total += int64(n)
		s.ready.b = nil
		if err != nil {
			return total, err
		}
	}
}

// fill makes something ready to be handed out.
func (s *stream) fill() error {
	for len(s.ready.b) == 0 {
		if err := s.ready.err; err != nil {
			s.endHash()
			s.recycle(s.ready)
			s.ready = chunk{err: err}
			return err
		}
		s.release(s.ready)
		s.ready = s.next()
		s.ready.whole = s.ready.b
	}
	return nil
}

// receive returns the next chunk of ciphertext, whose MAC is computed.
func (s *stream) receive() chunk {
	s.start.Do(func() {
		read := make(chan chunk, chunks)
		s.done.Go(func() { s.readSource(read) })
		s.done.Go(func() { s.authenticate(read) })
		if s.plain != nil {
			s.hashing.Go(s.hash)
		}
	})
	select {
	case c := <-s.out:
		return c
	case <-s.stop:
		return chunk{err: errClosed}
	}
}

// release gives back the buffer of a chunk that was used.
func (s *stream) release(c chunk) {
	switch {
	case c.buffer == nil:
	case s.plain != nil:
		s.used <- c // which has room for all there are
	default:
		s.free <- c.buffer
	}
}

// hash hashes the chunks that were used, and gives back their buffers. So it waits for
// nobody who uses them, nor they for it.
func (s *stream) hash() {
	for {
		select {
		case c, more := <-s.used:
			if !more {
				s.sum = digest.NewDigest(digest.SHA256, s.plain)
				return
			}
			s.plain.Write(c.whole)
			s.free <- c.buffer
		case <-s.stop:
			return
		}
	}
}

// endHash waits until all that was handed out is hashed, once the stream has ended.
func (s *stream) endHash() {
	if s.plain == nil || s.hashed {
		return
	}
	s.hashed = true
	s.release(s.ready)
	s.ready.buffer = nil
	close(s.used)
	s.hashing.Wait()
}

// recycle gives back all buffers of a stream that has ended, and that of c.
func (s *stream) recycle(c chunk) {
	if c.buffer != nil {
		buffers.Put(c.buffer)
	}
	for {
		select {
		case b := <-s.free:
			buffers.Put(b)
		case c := <-s.out:
			buffers.Put(c.buffer)
		default:
			return
		}
	}
}

// readSource fills buffers from the source.
func (s *stream) readSource(to chan<- chunk) {
	defer close(to)
	for made := 0; ; {
		var buffer *[BufferSize]byte
		select {
		case buffer = <-s.free:
		default:
			if made < chunks {
				made++
				buffer = buffers.Get().(*[BufferSize]byte)
				break
			}
			select {
			case buffer = <-s.free:
			case <-s.stop:
				return
			}
		}
		n, err := readFull(s.src, buffer[:])
		if s.prepare != nil {
			s.prepare(buffer[:n])
		}
		select {
		case to <- chunk{b: buffer[:n], buffer: buffer, err: err}:
		case <-s.stop:
			return
		}
		if err != nil {
			return
		}
	}
}

// readFull is [io.ReadFull], but reports how the source ended: an unexpected end
// is one of the source's own, such as of a file that is cut short.
func readFull(r io.Reader, b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var m int
		m, err = r.Read(b[n:])
		n += m
	}
	return n, err
}

// authenticate computes the MAC of what was read.
func (s *stream) authenticate(from <-chan chunk) {
	for c := range from {
		s.mac.Write(c.b)
		switch c.err {
		case nil:
		case io.EOF:
			c.err = s.end(s.mac.Sum(nil))
		default:
			c.err = fmt.Errorf("read the layer: %w", c.err)
		}
		select {
		case s.out <- c:
		case <-s.stop:
			return
		}
	}
}

// shut ends the stream, if it has not ended by itself, and waits until nothing reads
// from the source any more.
func (s *stream) shut() error {
	s.start.Do(func() {}) // never, if it has not been
	s.close.Do(func() { close(s.stop) })
	s.done.Wait()
	s.hashing.Wait()
	return nil
}
