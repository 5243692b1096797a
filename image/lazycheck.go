package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"hash/maphash"
	"io"
	"maps"
	"path"
	"strings"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A lazily mounted layer shows the files of its table of contents, and nobody compares it
// with the diff ID, under which other images share it. So before a layer is sealed, all of
// it is read: its diff ID has to be that of the image's configuration, and its table of
// contents has to list the files of its tar archive, and nothing else.

// lazyCheck checks a plain layer that is written to it. A write never fails and keeps
// nothing.
type lazyCheck struct {
	desc   ocispec.Descriptor
	tail   tail
	at     int64           // bytes that were written
	hash   digest.Digester // of the tail
	pipe   *io.PipeWriter
	result chan error
	diffID digest.Digester
}

// newLazyCheck begins to check a layer, of which it reads the end. The caller closes it.
func (w *work) newLazyCheck(ctx context.Context, desc ocispec.Descriptor) (*lazyCheck, error) {
	if desc.Size <= 0 {
		return nil, errNotChunked
	}
	t, err := readTail(desc.Size, func(p []byte, off int64) error {
		if err := w.readRange(ctx, desc, p, off); err != nil {
			return fmt.Errorf("its end can't be read before the rest of it: %w", err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return startLazyCheck(desc, t)
}

// startLazyCheck begins to check a layer with that end. The caller closes it.
func startLazyCheck(desc ocispec.Descriptor, t tail) (*lazyCheck, error) {
	toc, err := t.contents()
	if err != nil {
		return nil, fmt.Errorf("its table of contents can't be read: %w", err)
	}
	r, pipe := io.Pipe()
	c := &lazyCheck{desc: desc, tail: t, hash: digest.SHA256.Digester(), pipe: pipe, result: make(chan error, 1), diffID: digest.SHA256.Digester()}
	go func() {
		err := errors.Join(c.read(r, toc), toc.Close())
		_ = r.CloseWithError(err) // the rest is not needed
		c.result <- err
	}()
	return c, nil
}

// Write takes the next bytes of the layer.
func (c *lazyCheck) Write(p []byte) (int, error) {
	_, _ = c.pipe.Write(p) // what is wrong is the result
	if from := max(c.tail.offset-c.at, 0); from < int64(len(p)) {
		c.hash.Hash().Write(p[from:])
	}
	c.at += int64(len(p))
	return len(p), nil
}

// close ends a check, and returns what was wrong with the layer.
func (c *lazyCheck) close() error {
	_ = c.pipe.Close()
	err := <-c.result
	c.result <- err
	return err
}

// read reads the layer, to its end unless something is wrong with it.
func (c *lazyCheck) read(r io.Reader, toc *contents) error {
	z, err := c.tail.decompress(r)
	if err != nil {
		return err
	}
	defer z.Close()
	all := io.TeeReader(z, c.diffID.Hash())
	if err := sameFiles(tar.NewReader(all), toc); err != nil {
		return err
	}
	if got, want := toc.hash.Digest().String(), c.desc.Annotations[tocAnnotation]; got != want {
		return fmt.Errorf("annotation %s is %.80q, and its table of contents has the digest %s", tocAnnotation, want, got)
	}
	if _, err := io.Copy(io.Discard, all); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, r)
	return err
}

// lazy returns what may be sealed of the layer, all of which was written. diffIDs are those
// that configurations say it has.
func (c *lazyCheck) lazy(diffIDs []digest.Digest) (Lazy, error) {
	if err := c.close(); err != nil {
		return Lazy{}, err
	}
	l := Lazy{
		Plain: c.desc.Digest, Size: c.desc.Size, DiffID: c.diffID.Digest(), TOC: digest.Digest(c.desc.Annotations[tocAnnotation]),
		TailOffset: c.tail.offset, Tail: c.hash.Digest(),
	}
	switch {
	case c.at != c.desc.Size || l.Tail != digest.SHA256.FromBytes(c.tail.bytes):
		return Lazy{}, errors.New("its end was another when it was read before")
	case len(diffIDs) == 0:
		return Lazy{}, errors.New("no configuration of the image has a diff ID for it")
	}
	for _, d := range diffIDs {
		if d != l.DiffID {
			return Lazy{}, fmt.Errorf("its diff ID is %s, and a configuration of the image says %s", l.DiffID, d)
		}
	}
	return l, nil
}

// sameFiles checks that a table of contents lists the files of a tar archive, in the same
// order, with all that the snapshotter shows of them.
func sameFiles(archive *tar.Reader, toc *contents) error {
	names := fileNames{maphash.MakeSeed(), make(map[uint64]fileKind)}
	for {
		h, err := archive.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		name := cleanName(h.Name)
		if name == estargz.TOCTarName {
			continue
		}
		if err := names.add(h); err != nil {
			return err
		}
		e, err := toc.next()
		if err == io.EOF {
			return fmt.Errorf("its table of contents lacks %.200q", name)
		}
		if err == nil {
			err = sameFile(h, e)
		}
		if err == nil && h.Typeflag == tar.TypeReg && h.Size > 0 {
			err = sameContent(archive, h.Size, e, toc)
		}
		if err != nil {
			return fmt.Errorf("its table of contents does not describe its file %.200q: %w", name, err)
		}
	}
	e, err := toc.next()
	if err == nil {
		return fmt.Errorf("its table of contents has %s %.200q, which its tar archive has not", e.Type, e.Name)
	}
	if err != io.EOF {
		return fmt.Errorf("its table of contents can't be read: %w", err)
	}
	return nil
}

// fileNames finds files that the snapshotter shows differently from how they are unpacked.
// Of a duplicate file it takes the chunks of the first. It hides what is below a symbolic
// link. A directory that is not listed hides what lower layers have in its place, such as a
// symbolic link, where unpacking goes through that. And it links any two files of the layer,
// whichever is first, even directories.
type fileNames struct {
	seed  maphash.Seed
	kinds map[uint64]fileKind // by the hash of the name
}

// fileKind is what a file can be for those that follow it.
type fileKind byte

const (
	linkable fileKind = iota + 1 // by a hard link
	directory
	whiteout
)

// add adds the next file of the archive.
func (f fileNames) add(h *tar.Header) error {
	name := cleanName(h.Name)
	kind := linkable
	removed, isWhiteout := strings.CutPrefix(path.Base(name), whiteoutPrefix)
	switch {
	case isWhiteout:
		kind = whiteout
	case h.Typeflag == tar.TypeDir:
		kind = directory
	}
	if f.kind(name) != 0 {
		return fmt.Errorf("it has the file %.200q twice", name)
	}
	f.kinds[maphash.String(f.seed, name)] = kind
	if name == "" {
		if kind != directory {
			return errors.New("its root is no directory")
		}
		return nil
	}
	if parent := path.Dir(name); parent != "." {
		switch f.kind(parent) {
		case directory:
		case 0:
			return fmt.Errorf("it has the file %.200q without its directory before it", name)
		default:
			return fmt.Errorf("its file %.200q is no directory, and has files below it", parent)
		}
	}
	if isWhiteout && (removed == "" || removed == "." || removed == ".." || f.kind(path.Join(path.Dir(name), removed)) != 0) {
		return fmt.Errorf("its whiteout %.200q removes what is no file of another layer", name)
	}
	if h.Typeflag == tar.TypeLink && f.kind(cleanName(h.Linkname)) != linkable {
		return fmt.Errorf("its hard link %.200q is to %.200q, which is no file before it", name, h.Linkname)
	}
	return nil
}

// kind returns what a file is, or 0 if there has been none of that name.
func (f fileNames) kind(name string) fileKind { return f.kinds[maphash.String(f.seed, name)] }

// whiteoutPrefix begins the names of files that remove those of lower layers:
// https://github.com/opencontainers/image-spec/blob/v1.1.1/layer.md#whiteouts
const whiteoutPrefix = ".wh."

// tocTypes are what the table of contents calls the types of files.
var tocTypes = map[byte]string{
	tar.TypeReg: "reg", tar.TypeDir: "dir", tar.TypeSymlink: "symlink", tar.TypeLink: "hardlink",
	tar.TypeChar: "char", tar.TypeBlock: "block", tar.TypeFifo: "fifo",
}

// sameFile compares a file of the archive with its entry.
func sameFile(h *tar.Header, e estargz.TOCEntry) error {
	want := estargz.TOCEntry{Name: cleanName(h.Name), Type: tocTypes[h.Typeflag], Mode: h.Mode, UID: h.Uid, GID: h.Gid, ModTime3339: modTime(h.ModTime)}
	switch h.Typeflag {
	case tar.TypeReg:
		want.Size = h.Size
	case tar.TypeLink, tar.TypeSymlink:
		want.LinkName = h.Linkname
	case tar.TypeChar, tar.TypeBlock:
		want.DevMajor, want.DevMinor = int(h.Devmajor), int(h.Devminor)
	}
	xattrs := make(map[string][]byte)
	for key, value := range h.PAXRecords {
		if name, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
			xattrs[name] = []byte(value)
		}
		if strings.HasPrefix(key, "GNU.sparse.") {
			return errors.New("sparse files can't be described") // and may have any size
		}
	}
	switch {
	case want.Type == "":
		return fmt.Errorf("files of type %q can't be described", h.Typeflag)
	case cleanName(e.Name) != want.Name:
		return fmt.Errorf("it has %.200q there", e.Name)
	case e.Type != want.Type, e.Size != want.Size, e.LinkName != want.LinkName:
		return errors.New("another type, size or target")
	case e.Mode != want.Mode, e.UID != want.UID, e.GID != want.GID, e.ModTime3339 != want.ModTime3339,
		e.DevMajor != want.DevMajor, e.DevMinor != want.DevMinor:
		return errors.New("another mode, owner, time or device")
	case !maps.EqualFunc(e.Xattrs, xattrs, bytes.Equal):
		return errors.New("other extended attributes")
	}
	return nil
}

// sameContent compares the content of a regular file, of that size, with the digests of its
// chunks: that in its entry, and those in the entries of type chunk that follow it.
func sameContent(archive io.Reader, size int64, e estargz.TOCEntry, toc *contents) error {
	for at := int64(0); ; {
		n := e.ChunkSize
		if n == 0 {
			n = size - at
		}
		if e.ChunkOffset != at || n < 0 || n > size-at {
			return fmt.Errorf("a chunk of %d bytes at %d, where one at %d belongs", n, e.ChunkOffset, at)
		}
		chunk, err := hashOf(archive, n)
		if err != nil {
			return err
		}
		if chunk.String() != e.ChunkDigest {
			return fmt.Errorf("the chunk at %d has the digest %s, not %.80q", at, chunk, e.ChunkDigest)
		}
		if at += n; at == size {
			return nil
		}
		if e, err = toc.next(); err == nil && e.Type != "chunk" {
			err = fmt.Errorf("no chunk at %d", at)
		}
		if err != nil {
			return err
		}
	}
}

func hashOf(r io.Reader, n int64) (digest.Digest, error) {
	var h hash.Hash = digest.SHA256.Hash()
	if _, err := io.CopyN(h, r, n); err != nil {
		return "", err
	}
	return digest.NewDigest(digest.SHA256, h), nil
}

// cleanName returns the name of a file as the snapshotter knows it.
func cleanName(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

// modTime returns a time as the table of contents has it.
func modTime(t time.Time) string {
	if t.IsZero() || t.Unix() == 0 {
		return ""
	}
	return t.UTC().Round(time.Second).Format(time.RFC3339)
}
