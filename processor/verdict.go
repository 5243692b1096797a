package processor

import (
	"crypto/hmac"
	"errors"
	"io"
)

// ErrTampered is the error of a layer whose HMAC does not match: it was
// changed or cut short after it was encrypted.
var ErrTampered = errors.New("the layer's HMAC does not match: it was changed or cut short after it was encrypted")

// verdict decides whether a layer is authentic. Nothing else compares HMACs, and
// nothing else ends a layer with [io.EOF].
//
// It holds back one chunk of ciphertext. A chunk is served when another follows it,
// and the last one when the HMAC of the whole layer matches. If it does not match,
// nothing more is served, and the error is final.
type verdict struct {
	stream   *stream
	want     []byte // the HMAC that the layer's descriptor has
	held     chunk
	verified bool
}

// judge gives the verdict over a layer whose ciphertext has this HMAC.
func (v *verdict) judge(mac []byte) error {
	if hmac.Equal(mac, v.want) {
		return io.EOF
	}
	return ErrTampered
}

// next returns the next chunk to serve, decrypted.
func (v *verdict) next() chunk {
	c := v.held
	v.held = chunk{}
	if c.err == nil {
		v.held = v.stream.receive()
		switch err := v.held.err; err {
		case nil:
		case io.EOF:
			v.verified = true
		default:
			v.stream.release(c)
			c = chunk{err: err, buffer: v.held.buffer}
			v.held = chunk{}
		}
	}
	v.stream.ctr.XORKeyStream(c.b, c.b)
	return c
}

// Verified reports whether the layer was read to its end and is authentic. Callers that
// stop before [io.EOF] learn from it whether they have to call Verify.
func (d *Decrypter) Verified() bool { return d.verdict.verified }

// Verify reads the rest of the layer and returns nil if the whole of it is authentic,
// or else the error that Read gives.
func (d *Decrypter) Verify() error {
	_, err := d.WriteTo(io.Discard)
	return err
}

// Verify reads the ciphertext of a layer from r and returns nil if it is authentic. The
// error is [ErrTampered] if it was changed, or if k is the key of another layer.
func Verify(r io.Reader, k *LayerKey) error {
	d, err := NewDecrypter(r, k)
	if err != nil {
		return err
	}
	return d.Verify()
}
