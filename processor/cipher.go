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
)

// ErrTampered is the error of a layer whose HMAC does not match: it was
// changed or cut short after it was encrypted.
var ErrTampered = errors.New("the layer's HMAC does not match: it was changed or cut short after it was encrypted")

// stream is what both directions share: the cipher and the MAC, keyed alike.
type stream struct {
	src io.Reader
	ctr cipher.Stream
	mac hash.Hash
	err error // once set, the stream has ended
}

func newStream(r io.Reader, k *LayerKey) (stream, error) {
	block, err := aes.NewCipher(k.key)
	if err != nil {
		return stream{}, err
	}
	return stream{src: r, ctr: cipher.NewCTR(block, k.nonce), mac: hmac.New(sha256.New, k.key)}, nil
}

// Encrypter encrypts a layer as it is read. It is not safe for concurrent use.
type Encrypter struct {
	stream
	key *LayerKey
}

// NewEncrypter returns a reader of the ciphertext of the layer that r reads,
// of equal length, under k, which has to be new: see [NewLayerKey]. When it
// reports [io.EOF], k is complete.
func NewEncrypter(r io.Reader, k *LayerKey) (*Encrypter, error) {
	if k.mac != nil {
		return nil, errors.New("the layer key has encrypted a layer already")
	}
	s, err := newStream(r, k)
	if err != nil {
		return nil, err
	}
	return &Encrypter{stream: s, key: k}, nil
}

// Read reads and encrypts up to len(p) bytes.
func (e *Encrypter) Read(p []byte) (int, error) {
	if e.err != nil {
		return 0, e.err
	}
	n, err := e.src.Read(p)
	e.ctr.XORKeyStream(p[:n], p[:n])
	e.mac.Write(p[:n])
	if err == io.EOF {
		e.key.mac = e.mac.Sum(nil)
	}
	e.err = err
	return n, err
}

// Decrypter decrypts a layer as it is read. It is not safe for concurrent use.
type Decrypter struct {
	stream
	want  []byte    // the HMAC that the whole must have
	bufs  [2][]byte // one to hand out from, one to read ahead into
	ready []byte    // decrypted, not yet handed out
	ahead []byte    // read and decrypted, held back
}

// NewDecrypter returns a reader of the plain layer whose ciphertext r reads.
// It reports [io.EOF] only once the HMAC of the whole layer was verified, and
// [ErrTampered] otherwise. What it hands out before is not yet authentic; the
// last [BufferSize] bytes of what it reads it holds back until they are.
func NewDecrypter(r io.Reader, k *LayerKey) (*Decrypter, error) {
	if len(k.mac) != sha256.Size {
		return nil, errors.New("the layer key has no HMAC")
	}
	s, err := newStream(r, k)
	if err != nil {
		return nil, err
	}
	return &Decrypter{stream: s, want: k.mac}, nil
}

// Read reads up to len(p) bytes of the plain layer.
func (d *Decrypter) Read(p []byte) (int, error) {
	if len(d.ready) == 0 {
		if err := d.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, d.ready)
	d.ready = d.ready[n:]
	return n, nil
}

// WriteTo writes the plain layer to w, in writes of up to [BufferSize] bytes,
// and returns how many bytes it wrote. Its error is nil only for a whole and
// authentic layer.
func (d *Decrypter) WriteTo(w io.Writer) (int64, error) {
	var total int64
	for {
		if len(d.ready) == 0 {
			if err := d.next(); err == io.EOF {
				return total, nil
			} else if err != nil {
				return total, err
			}
		}
		n, err := w.Write(d.ready)
		total += int64(n)
		d.ready = d.ready[n:]
		if err != nil {
			return total, err
		}
	}
}

// next makes the bytes held back ready to be handed out, after reading on as
// far as it takes to know that they are not the last or that all is authentic.
func (d *Decrypter) next() error {
	if d.bufs[0] == nil {
		d.bufs[0], d.bufs[1] = make([]byte, BufferSize), make([]byte, BufferSize)
		d.ahead = d.fill()
	}
	if len(d.ahead) == 0 {
		return d.err // fill leaves a verdict whenever it returns nothing
	}
	held := d.ahead
	d.bufs[0], d.bufs[1] = d.bufs[1], d.bufs[0]
	d.ahead = d.fill()
	if d.err != nil && d.err != io.EOF {
		return d.err
	}
	d.ready = held
	return nil
}

// fill reads, authenticates and decrypts up to BufferSize bytes into the first
// buffer. At the end of the layer it leaves the verdict in d.err.
func (d *Decrypter) fill() []byte {
	if d.err != nil {
		return nil
	}
	n, err := io.ReadFull(d.src, d.bufs[0])
	b := d.bufs[0][:n]
	d.mac.Write(b)
	d.ctr.XORKeyStream(b, b)
	switch err {
	case nil:
	case io.EOF, io.ErrUnexpectedEOF:
		d.err = io.EOF
		if !hmac.Equal(d.mac.Sum(nil), d.want) {
			d.err = ErrTampered
		}
	default:
		d.err = fmt.Errorf("read the encrypted layer: %w", err)
	}
	return b
}
