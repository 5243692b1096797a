//go:build linux && cgo && !no_pkcs11

package pkcs11

import (
	"bytes"
	"io"
	"slices"
	"testing"
)

type closer struct{ io.ReadWriter }

func (closer) Close() error { return nil }

// FuzzMessage reads what may come through the pipe of a module's process that has
// gone wild, and writes what it could read.
func FuzzMessage(f *testing.F) {
	var good bytes.Buffer
	p := &pipe{w: closer{&good}}
	if err := p.write(message{id: 7, kind: requestUnwrap, version: 3, fields: [][]byte{[]byte("path"), {}, {1, 2}}}); err != nil {
		f.Fatal(err)
	}
	f.Add(good.Bytes())
	f.Add([]byte{0, 0, 0, 0})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0})
	f.Add(append([]byte{0, 0, 0, 21}, make([]byte, 21)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := (&pipe{r: closer{bytes.NewBuffer(b)}}).read()
		if err != nil {
			return
		}
		var again bytes.Buffer
		if err := (&pipe{w: closer{&again}}).write(m); err != nil || !bytes.HasPrefix(b, again.Bytes()) {
			t.Fatalf("%v: %x was written as %x", err, b, again.Bytes())
		}
	})
}

func TestMessageTooLarge(t *testing.T) {
	var b bytes.Buffer
	if err := (&pipe{w: closer{&b}}).write(message{fields: slices.Repeat([][]byte{make([]byte, 1000)}, 70)}); err == nil || b.Len() > 0 {
		t.Errorf("wrote %d bytes, %v", b.Len(), err)
	}
}
