package processor

import (
	"bytes"
	"errors"
	"io"
	"testing"
)

// TestVerdict reads parts of layers, verifies the rest, and reads on.
func TestVerdict(t *testing.T) {
	for _, size := range sizes {
		ciphertext, k := encrypt(t, randomBytes(size))
		changed := append(bytes.Clone(ciphertext), 0)
		for _, read := range []int{0, 1, size / 2, size} {
			for name, test := range map[string]struct {
				layer []byte
				want  error
			}{"authentic": {ciphertext, nil}, "changed": {changed, ErrTampered}} {
				d, err := NewDecrypter(bytes.NewReader(test.layer), k)
				if err != nil {
					t.Fatal(err)
				}
				if d.Verified() {
					t.Errorf("size %d, %s: verified before it is read", size, name)
				}
				if n, err := io.ReadFull(d, make([]byte, read)); n == read && n > 0 && err != nil {
					t.Errorf("size %d, %s: %d bytes, %v", size, name, n, err)
				}
				if test.want != nil && d.Verified() {
					t.Errorf("size %d, %s: verified", size, name)
				}
				for range 2 {
					if err := d.Verify(); !errors.Is(err, test.want) || d.Verified() != (test.want == nil) {
						t.Errorf("size %d, %s, %d read: %v, verified: %t", size, name, read, err, d.Verified())
					}
				}
				if n, err := d.Read(make([]byte, 1)); n > 0 || test.want == nil && err != io.EOF || test.want != nil && err != test.want {
					t.Errorf("size %d, %s: after the verdict: %d bytes, %v", size, name, n, err)
				}
			}
		}
		if err := Verify(bytes.NewReader(ciphertext), k); err != nil {
			t.Errorf("size %d: %v", size, err)
		}
		if err := Verify(bytes.NewReader(changed), k); err != ErrTampered {
			t.Errorf("size %d, changed: %v", size, err)
		}
		if err := Verify(bytes.NewReader(ciphertext), NewLayerKey("")); err == nil {
			t.Errorf("size %d: verified with a key that has no HMAC", size)
		}
	}
}

// TestClosedIsNotVerified closes a layer that is authentic before it is read.
func TestClosedIsNotVerified(t *testing.T) {
	ciphertext, k := encrypt(t, randomBytes(5*BufferSize))
	d, err := NewDecrypter(bytes.NewReader(ciphertext), k)
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
	if err := d.Verify(); err == nil || d.Verified() {
		t.Errorf("%v, verified: %t", err, d.Verified())
	}
}
