package processor

import (
	"bytes"
	"errors"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"
)

func TestReproduceGivesTheDigestOfTheSameLayerAlone(t *testing.T) {
	for _, size := range sizes {
		plain := randomBytes(size)
		ciphertext, k := encrypt(t, plain)
		d, err := k.Reproduce(bytes.NewReader(plain))
		if err != nil || d != digest.FromBytes(ciphertext) {
			t.Errorf("size %d: %s, %v", size, d, err)
		}
		if err := Verify(bytes.NewReader(ciphertext), k); err != nil {
			t.Errorf("size %d: the key changed: %v", size, err)
		}
		changed := append(bytes.Clone(plain), 0)
		if size > 0 {
			changed = changed[:size]
			changed[size-1] ^= 1
		}
		if d, err := k.Reproduce(bytes.NewReader(changed)); !errors.Is(err, ErrTampered) || d != "" {
			t.Errorf("size %d, changed: %s, %v", size, d, err)
		}
		other := NewLayerKey("")
		other.mac = k.mac
		if _, err := other.Reproduce(bytes.NewReader(plain)); size > 0 && !errors.Is(err, ErrTampered) {
			t.Errorf("size %d, another key: %v", size, err)
		}
	}
	_, k := encrypt(t, []byte("x"))
	if _, err := k.Reproduce(iotest.ErrReader(errors.New("broken"))); err == nil || errors.Is(err, ErrTampered) {
		t.Errorf("a reader that breaks: %v", err)
	}
}
