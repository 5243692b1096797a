package image

import (
	"errors"
	"fmt"
	"io"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// VerifyLazy reads a plain layer from r to its end, and checks that l is true of it: that it
// has that diff ID, and that its table of contents lists the files of its tar archive, and
// nothing else. end are the layer's bytes from l.TailOffset on. A seal says only what those
// who have the layer's key wanted it to. The error wraps [processor.ErrTampered] if it was
// not the truth, and that of r if the layer could not be read.
func VerifyLazy(r io.Reader, l Lazy, end []byte) error {
	desc := ocispec.Descriptor{Digest: l.Plain, Size: l.Size, Annotations: map[string]string{tocAnnotation: l.TOC.String()}}
	t, err := l.tail(end)
	if err != nil {
		return untrue(err)
	}
	check, err := startLazyCheck(desc, t)
	if err != nil {
		return untrue(err)
	}
	defer check.close()
	if _, err := io.CopyBuffer(writerOnly{check}, r, make([]byte, processor.BufferSize)); err != nil {
		return err
	}
	got, err := check.lazy([]digest.Digest{l.DiffID})
	if err == nil && got != l {
		err = errors.New("its end is another")
	}
	if err != nil {
		return untrue(err)
	}
	return nil
}

// VerifyTOC checks that the table of contents of a layer, of which end are the bytes from
// l.TailOffset on, has the digest that l says, and no more bytes and entries than a reader
// can have in memory. The error wraps [processor.ErrTampered].
func VerifyTOC(l Lazy, end []byte) error {
	t, err := l.tail(end)
	if err != nil {
		return untrue(err)
	}
	got, entries, err := t.digest()
	switch {
	case err != nil:
	case got != l.TOC:
		err = fmt.Errorf("its table of contents has the digest %s", got)
	case entries > maxEntries:
		err = fmt.Errorf("its table of contents has more than %d entries", maxEntries)
	}
	if err != nil {
		return untrue(err)
	}
	return nil
}

// digest returns the digest of the table of contents, and how many entries a reader makes of
// it at the most. To decode them all takes several times as long.
func (t tail) digest() (_ digest.Digest, entries int, err error) {
	r, z, err := t.json()
	if err != nil {
		return "", 0, err
	}
	defer z.Close()
	hash := digest.Canonical.Digester()
	var count entryCounter
	n, err := io.Copy(io.MultiWriter(hash.Hash(), &count), io.LimitReader(r, maxTOC+1))
	if err == nil && n > maxTOC {
		err = fmt.Errorf("it has more than %d bytes", maxTOC)
	}
	return hash.Digest(), count.entries, err
}

// entryCounter counts the elements of arrays and objects that are members of the outermost
// object, such as the entries of a table of contents. Elements of each kind count:
// [encoding/json] makes an entry of a number, too, before it fails. What is no JSON, it does
// not decode at all.
type entryCounter struct {
	entries int

	depth             int
	inString, escaped bool
}

func (c *entryCounter) Write(p []byte) (int, error) {
	for _, b := range p {
		switch {
		case c.escaped:
			c.escaped = false
		case c.inString:
			c.escaped, c.inString = b == '\\', b != '"'
		case b == '"':
			c.inString = true
		case b == '{' || b == '[':
			if c.depth++; c.depth == 2 {
				c.entries++
			}
		case b == '}' || b == ']':
			c.depth--
		case b == ',' && c.depth == 2:
			c.entries++
		}
	}
	return len(p), nil
}

func (l Lazy) tail(end []byte) (tail, error) {
	t, err := parseFooter(end[max(0, len(end)-estargz.FooterSize):], l.Size)
	if err == nil && t.offset != l.TailOffset {
		err = fmt.Errorf("its table of contents is at %d", t.offset)
	}
	t.bytes = end
	return t, err
}

func untrue(err error) error {
	return fmt.Errorf("the layer is not what its key has sealed: %w: %w", err, processor.ErrTampered)
}
