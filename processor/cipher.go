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
)

// ErrTampered is the error of a layer whose HMAC does not match: it was
// changed or cut short after it was encrypted.
var ErrTampered = errors.New("the layer's HMAC does not match: it was changed or cut short after it was encrypted")

// Encrypter encrypts a layer as it is read. It is not safe for concurrent use.
type Encrypter struct{ *stream }

// NewEncrypter returns a reader of the ciphertext of the layer that r reads,
// of equal length, under k, which has to be new: see [NewLayerKey]. When it
// reports [io.EOF], k is complete. Whoever does not read to the end or to an
// error has to call Close.
func NewEncrypter(r io.Reader, k *LayerKey) (*Encrypter, error) {
	if k.mac != nil {
		return nil, errors.New("the layer key has encrypted a layer already")
	}
	s, err := newStream(r, k)
	if err != nil {
		return nil, err
	}
	s.prepare = func(b []byte) { s.ctr.XORKeyStream(b, b) }
	s.end = func() error {
		k.mac = s.mac.Sum(nil)
		return io.EOF
	}
	s.next = s.receive
	return &Encrypter{s}, nil
}

// Decrypter decrypts a layer as it is read. It is not safe for concurrent use.
type Decrypter struct {
	*stream
	ahead chunk // ciphertext that is held back
}

// NewDecrypter returns a reader of the plain layer whose ciphertext r reads.
// It reports [io.EOF], and WriteTo no error, only once the HMAC of the whole layer
// was verified, and [ErrTampered] otherwise. What it hands out before is not yet authentic; the
// last [BufferSize] bytes of what it reads it holds back until they are.
// Whoever does not read to the end or to an error has to call Close.
func NewDecrypter(r io.Reader, k *LayerKey) (*Decrypter, error) {
	if len(k.mac) != sha256.Size {
		return nil, errors.New("the layer key has no HMAC")
	}
	s, err := newStream(r, k)
	if err != nil {
		return nil, err
	}
	want := k.mac // of the whole
	s.end = func() error {
		if hmac.Equal(s.mac.Sum(nil), want) {
			return io.EOF
		}
		return ErrTampered
	}
	d := &Decrypter{stream: s}
	s.next = d.decrypted
	return d, nil
}

// decrypted returns what was held back, once it is known that it is not the last
// or that all is authentic.
func (d *Decrypter) decrypted() chunk {
	c := d.ahead
	d.ahead = chunk{}
	if c.err == nil {
		d.ahead = d.receive()
		if err := d.ahead.err; err != nil && err != io.EOF {
			d.release(c)
			c = chunk{err: err, buffer: d.ahead.buffer}
			d.ahead = chunk{}
		}
	}
	d.ctr.XORKeyStream(c.b, c.b)
	return c
}

// chunks is how many buffers of BufferSize bytes a stream has at most: one
// that is read into, one that is authenticated, one that is held back, one
// that is handed out, and two on their way, so that the MAC never waits.
const chunks = 6

// buffers are those that no stream uses now.
var buffers = sync.Pool{New: func() any { return new([BufferSize]byte) }}

// chunk is a piece of a layer.
type chunk struct {
	b      []byte
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
	prepare func([]byte) // done to what was read before its MAC is computed; may be nil
	end     func() error // what the end of the layer means
	next    func() chunk // the next to hand out, made from what is received
	ready   chunk        // handed out now

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

// Read reads up to len(p) bytes of the result.
func (s *stream) Read(p []byte) (int, error) {
	if err := s.fill(); err != nil {
		return 0, err
	}
	n := copy(p, s.ready.b)
	s.ready.b = s.ready.b[n:]
	return n, nil
}

// WriteTo writes the result to w, in writes of up to [BufferSize] bytes, and
// returns how many bytes it wrote. Its error is nil where that of Read is
// [io.EOF].
func (s *stream) WriteTo(w io.Writer) (total int64, err error) {
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
			s.recycle(s.ready)
			s.ready = chunk{err: err}
			return err
		}
		s.release(s.ready)
		s.ready = s.next()
	}
	return nil
}

// receive returns the next chunk of ciphertext, whose MAC is computed.
func (s *stream) receive() chunk {
	s.start.Do(func() {
		read := make(chan chunk, chunks)
		s.done.Go(func() { s.read(read) })
		s.done.Go(func() { s.authenticate(read) })
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
	if c.buffer != nil {
		s.free <- c.buffer
	}
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

// read fills buffers from the source.
func (s *stream) read(to chan<- chunk) {
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
			c.err = s.end()
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

// Close ends the stream, if it has not ended by itself, and waits until nothing
// reads from the source any more. It may be called while another goroutine
// reads from the stream, which then gets an error.
func (s *stream) Close() error {
	s.start.Do(func() {}) // never, if it has not been
	s.close.Do(func() { close(s.stop) })
	s.done.Wait()
	return nil
}
