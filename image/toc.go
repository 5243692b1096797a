package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// MaxTail bounds the end of a layer that is sealed, from its table of contents on, in
	// bytes: who serves the layer has it in memory. It takes about 100 bytes for each file.
	MaxTail = 32 << 20
	// maxTOC bounds the JSON of a table of contents, in bytes: that of about 700,000 files.
	maxTOC = 256 << 20
	// maxTOCEntry bounds the JSON of one of its entries, in bytes: a tar archive has at most
	// 1 MiB of names and extended attributes for a file.
	maxTOCEntry = 8 << 20
	// maxEntries bounds the entries of a table of contents: the snapshotter has all of
	// them in memory, in several hundred bytes each.
	maxEntries = 1 << 20
	// zstdFooterSize is the size of the footer of zstd:chunked, in bytes.
	zstdFooterSize = 40
	// maxZstdWindow bounds the memory that a zstd layer takes, in bytes.
	maxZstdWindow = 512 << 20
)

// isMarked reports whether a plain layer says that it can be pulled lazily.
func isMarked(l ocispec.Descriptor) bool {
	return l.Annotations[tocAnnotation] != "" && images.IsLayerType(l.MediaType)
}

// tail is the end of a plain layer that is eStargz or zstd:chunked, from its table of
// contents on. Nobody has checked yet that it is.
type tail struct {
	offset int64
	bytes  []byte
	zstd   bool // or else gzip
	toc    int  // bytes of the compressed table of contents, with which the tail begins
}

// readTail finds the tail of a layer of that size.
//
// eStargz ends with an empty gzip member whose extra field has the offset, zstd:chunked
// with a skippable frame:
// https://github.com/containerd/stargz-snapshotter/blob/v0.19.1/docs/estargz.md
func readTail(size int64, readAt func(p []byte, off int64) error) (tail, error) {
	footer := make([]byte, min(size, estargz.FooterSize))
	if err := readAt(footer, size-int64(len(footer))); err != nil {
		return tail{}, err
	}
	t, err := parseFooter(footer, size)
	if err != nil {
		return tail{}, err
	}
	if n := size - t.offset; n > MaxTail {
		return tail{}, fmt.Errorf("its table of contents and footer have %d bytes, more than %d", n, MaxTail)
	}
	t.bytes = make([]byte, size-t.offset)
	return t, readAt(t.bytes, t.offset)
}

var errNotChunked = errors.New("it has no footer of eStargz or zstd:chunked")

// parseFooter reads the end of a layer of that size.
func parseFooter(footer []byte, size int64) (t tail, err error) {
	const id, magic = "SG\x16\x00", "STARGZ" // at 12 and 32, with 16 hexadecimal digits between them
	if len(footer) == estargz.FooterSize {
		extra := footer[12:38]
		if bytes.Equal(footer, estargz.CreateGzipFooter(extra)) && strings.HasPrefix(string(extra), id) && strings.HasSuffix(string(extra), magic) {
			offset, err := strconv.ParseUint(string(extra[4:20]), 16, 63)
			toc := size - int64(offset) - estargz.FooterSize
			if err != nil || toc <= 0 {
				return tail{}, fmt.Errorf("its footer says that the table of contents is at %q, and the layer has %d bytes", extra[4:20], size)
			}
			return tail{offset: int64(offset), toc: int(toc)}, nil
		}
	}
	if len(footer) < zstdFooterSize || string(footer[len(footer)-8:]) != "GnUlInUx" {
		return tail{}, errNotChunked
	}
	footer = footer[len(footer)-zstdFooterSize:]
	offset, toc := binary.LittleEndian.Uint64(footer), binary.LittleEndian.Uint64(footer[8:])
	if end := uint64(size) - zstdFooterSize; offset > end || toc == 0 || toc > end-offset {
		return tail{}, fmt.Errorf("its footer says that the table of contents has %d bytes at %d, and the layer has %d", toc, offset, size)
	}
	return tail{offset: int64(offset), zstd: true, toc: int(toc)}, nil
}

// decompress returns a reader of what a layer, or the table of contents of one, was before
// it was compressed. The caller closes it.
func (t tail) decompress(r io.Reader) (io.ReadCloser, error) {
	if !t.zstd {
		return gzip.NewReader(r)
	}
	z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxZstdWindow))
	if err != nil {
		return nil, err
	}
	return z.IOReadCloser(), nil
}

// json opens the JSON of the table of contents. The caller closes z.
func (t tail) json() (r io.Reader, z io.Closer, err error) {
	decompressed, err := t.decompress(bytes.NewReader(t.bytes[:t.toc]))
	if err != nil {
		return nil, nil, err
	}
	if t.zstd {
		return decompressed, decompressed, nil
	}
	tr := tar.NewReader(decompressed)
	h, err := tr.Next()
	if err == nil && h.Name != estargz.TOCTarName {
		err = fmt.Errorf("its name is %.80q", h.Name)
	}
	if err != nil {
		return nil, nil, errors.Join(err, decompressed.Close())
	}
	return tr, decompressed, nil
}

// contents opens the table of contents. The caller closes it.
func (t tail) contents() (*contents, error) {
	r, z, err := t.json()
	if err != nil {
		return nil, err
	}
	hash := digest.Canonical.Digester()
	bounded := &boundedReader{Reader: r}
	d := json.NewDecoder(io.TeeReader(bounded, hash.Hash()))
	bounded.decoded = d.InputOffset
	c := &contents{Closer: z, json: d, hash: hash}
	if err := c.begin(); err != nil {
		return nil, errors.Join(err, z.Close())
	}
	return c, nil
}

// contents reads a table of contents entry by entry, as JSON that has one reading.
type contents struct {
	io.Closer
	json  *json.Decoder
	hash  digest.Digester
	empty bool // its entries are null, as of a layer without files
	end   bool
	count int // of the entries that were read
}

// begin reads on to the first entry.
func (c *contents) begin() error {
	if err := c.delim('{'); err != nil {
		return err
	}
	for c.json.More() {
		key, err := c.key()
		if err != nil {
			return err
		}
		if key == "entries" {
			t, err := c.json.Token()
			if c.empty = t == nil; err == nil && !c.empty && t != json.Delim('[') {
				err = fmt.Errorf("its entries are %.80q", fmt.Sprint(t))
			}
			return err
		}
	}
	return errors.New("it has no entries")
}

// next returns the next entry, or [io.EOF] after the last one.
func (c *contents) next() (e estargz.TOCEntry, err error) {
	if c.end {
		return e, io.EOF
	}
	if !c.empty && c.json.More() {
		if c.count++; c.count > maxEntries {
			return e, fmt.Errorf("it has more than %d entries", maxEntries)
		}
		err = c.json.Decode(&e)
		return e, err
	}
	c.end = true
	if !c.empty {
		if err := c.delim(']'); err != nil {
			return e, err
		}
	}
	for c.json.More() {
		if key, err := c.key(); err != nil || key == "entries" {
			return e, errors.Join(fmt.Errorf("duplicate key %.80q", key), err)
		}
	}
	if err := c.delim('}'); err != nil {
		return e, err
	}
	if _, err := c.json.Token(); err == nil {
		return e, errors.New("something follows it")
	} else if err != io.EOF {
		return e, err
	}
	return e, io.EOF
}

// key reads a key of the object, with its value unless it is entries.
func (c *contents) key() (string, error) {
	t, err := c.json.Token()
	if err != nil {
		return "", err
	}
	key, _ := t.(string)
	switch {
	case key == "entries":
		return key, nil
	case strings.EqualFold(key, "entries"):
		return key, fmt.Errorf("key %q can be taken for %q", key, "entries")
	}
	var skipped json.RawMessage
	return key, c.json.Decode(&skipped)
}

func (c *contents) delim(want json.Delim) error {
	t, err := c.json.Token()
	if err == nil && t != want {
		err = fmt.Errorf("%.80q is where %q belongs", fmt.Sprint(t), want.String())
	}
	return err
}

// boundedReader fails once the table of contents, or an entry of it, is too large.
type boundedReader struct {
	io.Reader
	n       int64        // bytes that were read
	decoded func() int64 // bytes of them that are no longer in memory
}

func (b *boundedReader) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	b.n += int64(n)
	if b.n > maxTOC {
		return 0, fmt.Errorf("it has more than %d bytes", maxTOC)
	}
	if b.n-b.decoded() > maxTOCEntry {
		return 0, fmt.Errorf("an entry has more than %d bytes", maxTOCEntry)
	}
	return n, err
}

// ranged is a store that reads parts of a blob that it reads in order otherwise. Nobody
// has checked them against the blob's digest.
type ranged interface {
	ReadRange(ctx context.Context, desc ocispec.Descriptor, p []byte, off int64) error
}

// readRange reads len(p) bytes of a blob, which nobody has checked.
func (w *work) readRange(ctx context.Context, desc ocispec.Descriptor, p []byte, off int64) error {
	if data := inlined(desc); data != nil {
		copy(p, data[off:])
		return nil
	}
	if r, ok := w.Store.(ranged); ok {
		return r.ReadRange(ctx, desc, p, off)
	}
	ra, err := w.ReaderAt(ctx, desc)
	if err != nil {
		return err
	}
	defer ra.Close()
	if n, err := ra.ReadAt(p, off); n < len(p) {
		return fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
	}
	return nil
}
