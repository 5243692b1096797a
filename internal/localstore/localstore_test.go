package localstore

import (
	"bytes"
	"io"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
)

// pieces is a blob that counts reads.
type pieces struct {
	*bytes.Reader
	reads int
}

func (p *pieces) Close() error { return nil }

func (p *pieces) Size() int64 { return p.Reader.Size() }

func (p *pieces) ReadAt(b []byte, off int64) (int, error) {
	p.reads++
	return p.Reader.ReadAt(b, off)
}

func TestReadAhead(t *testing.T) {
	blob := make([]byte, 2*readAheadSize+12345)
	for i := range blob {
		blob[i] = byte(i * i >> 5)
	}
	p := &pieces{Reader: bytes.NewReader(blob)}
	got, err := io.ReadAll(content.NewReader(&readAhead{ReaderAt: p}))
	if err != nil || !bytes.Equal(got, blob) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if p.reads > 5 {
		t.Errorf("%d reads", p.reads)
	}
	r := &readAhead{ReaderAt: p}
	for _, at := range []struct{ off, n int }{{0, 10}, {5, 2}, {readAheadSize - 3, 100}, {7, 3 << 20}, {len(blob) - 5, 10}, {len(blob), 1}, {1 << 20, 1 << 20}, {3, 4}} {
		b := make([]byte, at.n)
		n, err := r.ReadAt(b, int64(at.off))
		want := blob[at.off:min(len(blob), at.off+at.n)]
		if !bytes.Equal(b[:n], want) || (err == io.EOF) != (at.off+at.n > len(blob)) || err != nil && err != io.EOF {
			t.Errorf("%+v: %d bytes, %v", at, n, err)
		}
	}
}
