package processor

import (
	"bytes"
	"errors"
	"io"
	"runtime"
	"sync"
	"testing"
	"testing/iotest"
	"time"
)

// TestClose abandons streams at each stage and checks that nothing goes on.
func TestClose(t *testing.T) {
	before := runtime.NumGoroutine()
	plain := randomBytes(10 * BufferSize)
	ciphertext, k := encrypt(t, plain)
	for _, read := range []int{0, 1, BufferSize, 3*BufferSize + 5, len(plain)} {
		d, err := NewDecrypter(bytes.NewReader(ciphertext), k)
		if err != nil {
			t.Fatal(err)
		}
		e, err := NewEncrypter(bytes.NewReader(plain), NewLayerKey(""))
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range []io.ReadCloser{d, e} {
			if _, err := io.ReadFull(s, make([]byte, read)); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := io.Copy(io.Discard, s); err == nil && read < len(plain) {
				t.Errorf("closed after %d bytes, it reads on to the end", read)
			}
		}
	}
	for range 12000 { // a minute
		if runtime.NumGoroutine() <= before {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Errorf("%d goroutines, were %d", runtime.NumGoroutine(), before)
}

// TestCloseWhileReading closes a stream that another goroutine reads from.
func TestCloseWhileReading(t *testing.T) {
	ciphertext, k := encrypt(t, randomBytes(BufferSize))
	for range 100 {
		d, err := NewDecrypter(io.MultiReader(bytes.NewReader(ciphertext), bytes.NewReader(make([]byte, 20*BufferSize))), k)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := d.WriteTo(io.Discard); err == nil {
				t.Error("a changed layer was read to its end")
			}
		})
		d.Close()
		wg.Wait()
	}
}

// TestSourceCutShort encrypts from a source that itself reports that it was cut
// short, which is not the end of a layer.
func TestSourceCutShort(t *testing.T) {
	k := NewLayerKey("")
	e, err := NewEncrypter(io.MultiReader(bytes.NewReader(randomBytes(100)), iotest.ErrReader(io.ErrUnexpectedEOF)), k)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, e); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("got %v", err)
	}
	if _, _, err := k.PublicOptions(); err == nil {
		t.Error("the layer key is complete")
	}
}
