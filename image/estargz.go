package image

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/spoolfile"
)

// estargzLevel is how hard layers are compressed. The library's default, 9, takes three
// times as long for one percent.
const estargzLevel = 6

const (
	// chunkSize is that of the library's chunks of large files, in bytes.
	chunkSize = 4 << 20
	// tocEntrySize is about what the table of contents has of a file or a chunk besides
	// names, in bytes.
	tocEntrySize = 300
)

// estargzLayer is a layer that was made.
type estargzLayer struct {
	digest, toc digest.Digest
	was, diffID digest.Digest // the diff IDs of the layer before, and of this one
}

// toEstargz converts a layer into a temporary file, which the caller closes.
//
// The library's Build would do that with several processors, but keeps the uncompressed
// layer in files that stay, readable, if the process is killed, and its result depends on
// how many processors there are.
func (w *work) toEstargz(ctx context.Context, desc ocispec.Descriptor) (_ spooled, made estargzLayer, err error) {
	f, err := spoolfile.Create()
	if err != nil {
		return spooled{}, made, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	// What becomes of files that the archive has once more later is known once all of it
	// was read.
	var replaced map[int]*tar.Header
	for range 2 {
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return spooled{}, made, err
		}
		if err := f.Truncate(0); err != nil {
			return spooled{}, made, err
		}
		var found map[int]*tar.Header
		err := w.read(ctx, desc, func(r io.Reader) (err error) {
			made, found, err = writeEstargz(ctx, f, &contextReader{ctx, r}, replaced)
			return err
		})
		if err != nil {
			return spooled{}, made, err
		}
		if len(found) == len(replaced) {
			break
		}
		replaced = found
	}
	size, err := f.Seek(0, io.SeekCurrent)
	return spooled{f, size}, made, err
}

// writeEstargz reads a layer and writes it as eStargz, with the entries at those indexes
// replaced, or left out. It returns what of that copyFiles has found.
func writeEstargz(ctx context.Context, f *os.File, r io.Reader, replace map[int]*tar.Header) (made estargzLayer, replaced map[int]*tar.Header, err error) {
	layer, err := decompressed(r)
	if err != nil {
		return made, nil, err
	}
	defer layer.Close()
	was, hash := digest.SHA256.Digester(), digest.SHA256.Digester()
	from := io.TeeReader(layer, was.Hash())
	spool := &spoolWriter{f}
	w := estargz.NewWriterWithCompressor(io.MultiWriter(spool, hash.Hash()), newGzipCompressor())
	pr, pw := io.Pipe()
	done := make(chan error, 1)
	go func() {
		var err error
		replaced, err = copyFiles(ctx, tar.NewWriter(pw), tar.NewReader(from), replace, maxTOC)
		_ = pw.CloseWithError(err)
		done <- err
	}()
	err = w.AppendTar(pr)
	_ = pr.CloseWithError(err)
	if cerr := <-done; cerr != nil {
		err = cerr // of which the other is a consequence
	}
	if err == nil {
		_, err = io.Copy(io.Discard, from) // what follows the archive is covered by the diff ID
	}
	if err != nil {
		return made, nil, err
	}
	if made.toc, err = w.Close(); err != nil {
		return made, nil, err
	}
	made.digest, made.was, made.diffID = hash.Digest(), was.Digest(), digest.Digest(w.DiffID())
	return made, replaced, nil
}

// copyFiles copies a layer's files, after one that says that none of them has to be
// fetched before it is read. Their table of contents may have limit bytes, about, since
// the library has it in memory.
//
// It returns what is to be done for each name to be there once, with what unpacking leaves
// of it, by the index of the entry: a file that another one replaces later is left out (nil),
// and a directory gets the header of the last of its name. Files that a hard link between
// them is to, or that become another kind of file, stay. Then the layer is not sealed.
func copyFiles(ctx context.Context, to *tar.Writer, from *tar.Reader, replace map[int]*tar.Header, limit int64) (replaced map[int]*tar.Header, err error) {
	const landmark = "\x0f" // as the library has it
	if err := to.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: estargz.NoPrefetchLandmark, Size: int64(len(landmark))}); err != nil {
		return nil, err
	}
	if _, err := io.WriteString(to, landmark); err != nil {
		return nil, err
	}
	replaced, last, left := map[int]*tar.Header{}, map[string]archived{}, limit
	for i := 0; ; i++ {
		h, err := from.Next()
		if err == io.EOF {
			return replaced, to.Close()
		}
		if err != nil {
			return nil, err
		}
		switch name := cleanName(h.Name); {
		case h.Typeflag == tar.TypeXGlobalHeader, name == estargz.NoPrefetchLandmark, name == estargz.PrefetchLandmark, name == estargz.TOCTarName:
			continue // what unpacks layers ignores the first kind
		default:
			e := archived{index: i, dir: h.Typeflag == tar.TypeDir}
			switch before, ok := last[name]; {
			case !ok || before.dir != e.dir || before.linked:
			case e.dir:
				e.index = before.index // what is below it needs it first
				replaced[before.index], replaced[i] = h, nil
			default:
				replaced[before.index] = nil
			}
			last[name] = e
			if target := cleanName(h.Linkname); h.Typeflag == tar.TypeLink {
				if e, ok := last[target]; ok {
					e.linked = true
					last[target] = e
				}
			}
		}
		each := tocEntrySize + jsonSize(h.Name) // of chunks too
		if left -= each + jsonSize(h.Linkname) + h.Size/chunkSize*each; left < 0 {
			return nil, fmt.Errorf("%w: its table of contents would have more than %d bytes: split the layer", ErrLimit, limit)
		}
		for key, value := range h.PAXRecords {
			left -= int64(len(key) + len(value))
		}
		if by, ok := replace[i]; ok {
			if by == nil {
				continue
			}
			h = by
		}
		switch h.Typeflag {
		case tar.TypeDir, tar.TypeLink, tar.TypeSymlink:
		default:
			// The library does not write others with a slash at the end, without which
			// they are unpacked too.
			h.Name = strings.TrimRight(h.Name, "/")
		}
		if err := to.WriteHeader(h); err != nil {
			return nil, fmt.Errorf("file %.200q: %w", h.Name, err)
		}
		if _, err := io.Copy(to, &contextReader{ctx, from}); err != nil { // holes of sparse files are not read
			return nil, fmt.Errorf("file %.200q: %w", h.Name, err)
		}
	}
}

// jsonSize returns how long s is in JSON, at most, in bytes.
func jsonSize(s string) int64 {
	n := len(s)
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || strings.IndexByte(`"\\<>&`, c) >= 0 {
			n += len(`\u0000`) - 1
		}
	}
	return int64(n)
}

// archived is the last file of its name in an archive.
type archived struct {
	index  int
	dir    bool
	linked bool // a hard link is to it
}

// decompressed returns a reader of a layer's tar archive, which the caller closes.
func decompressed(r io.Reader) (io.ReadCloser, error) {
	b := bufio.NewReader(r)
	magic, err := b.Peek(10)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch compression.DetectCompression(magic) {
	case compression.Gzip:
		return gzip.NewReader(b)
	case compression.Zstd:
		return tail{zstd: true}.decompress(b)
	}
	return io.NopCloser(b), nil
}

// gzipCompressor compresses files with compressors that are used again: each file has one.
type gzipCompressor struct {
	*estargz.GzipCompressor
	free sync.Pool
}

func newGzipCompressor() *gzipCompressor {
	return &gzipCompressor{GzipCompressor: estargz.NewGzipCompressorWithLevel(estargzLevel)}
}

// Writer returns a writer that compresses to w.
func (c *gzipCompressor) Writer(w io.Writer) (estargz.WriteFlushCloser, error) {
	if z, ok := c.free.Get().(*gzip.Writer); ok {
		z.Reset(w)
		return &pooledWriter{z, &c.free}, nil
	}
	z, err := gzip.NewWriterLevel(w, estargzLevel)
	return &pooledWriter{z, &c.free}, err
}

type pooledWriter struct {
	*gzip.Writer
	pool *sync.Pool
}

func (w *pooledWriter) Close() error {
	err := w.Writer.Close()
	w.pool.Put(w.Writer)
	return err
}

// spoolWriter says where there is no room for a temporary file.
type spoolWriter struct{ *os.File }

func (w *spoolWriter) Write(p []byte) (int, error) {
	n, err := w.File.Write(p)
	if err != nil {
		err = fmt.Errorf("temporary file in %s, which takes as much room as the converted layers (TMPDIR names another directory): %w", os.TempDir(), errors.Unwrap(err))
	}
	return n, err
}

// contextReader reads until ctx is done.
type contextReader struct {
	ctx context.Context
	io.Reader
}

func (r *contextReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}
