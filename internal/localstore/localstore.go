// Package localstore reads and writes containerd's content store in its files where they
// are on this machine.
package localstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/containerd/v2/plugins/content/local"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
)

// New returns containerd's content store, with blobs read from and written to its files
// where containerd keeps them in files of this machine. Over the content API
// each read is a call, which makes a pull several times slower.
func New(client *containerd.Client) content.Store {
	return &store{Store: client.ContentStore(), client: client}
}

type store struct {
	content.Store
	client *containerd.Client

	apiOnly   atomic.Bool // containerd did not take a blob from its file
	unadopted sync.Map    // the refs of blobs that are in files and that containerd may not have taken

	mu   sync.Mutex
	root string // of the local content store, once it is known
}

// ReaderAt opens the blob's file after asking containerd whether the blob is in the
// caller's namespace, because the file alone does not prove namespace access.
func (s *store) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("blob %.80q: %w", desc.Digest, err)
	}
	info, err := s.Info(ctx, desc.Digest)
	if err != nil {
		return nil, err
	}
	ra, err := s.open(ctx, info)
	if err == nil {
		return ra, nil
	}
	logrus.WithError(err).WithField("digest", desc.Digest).Debug("blob is read over the content API")
	if ra, err = s.Store.ReaderAt(ctx, desc); err != nil {
		return nil, err
	}
	return &readAhead{ReaderAt: ra}, nil
}

// open opens the file of a blob.
func (s *store) open(ctx context.Context, info content.Info) (content.ReaderAt, error) {
	root, err := s.contentRoot(ctx)
	if err != nil {
		return nil, err
	}
	ra, err := local.OpenReader(filepath.Join(root, "blobs", info.Digest.Algorithm().String(), info.Digest.Encoded()))
	if err != nil {
		s.forgetRoot() // containerd may have been restarted with another
		return nil, err
	}
	if ra.Size() != info.Size {
		ra.Close()
		return nil, fmt.Errorf("its file has %d bytes, and containerd says %d", ra.Size(), info.Size)
	}
	return ra, nil
}

// contentRoot returns the directory of the content store, as containerd reports it.
func (s *store) contentRoot(ctx context.Context) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.root != "" {
		return s.root, nil
	}
	list, err := s.client.IntrospectionService().Plugins(ctx, "type=="+string(plugins.ContentPlugin))
	if err != nil {
		return "", err
	}
	for _, p := range list.Plugins {
		if root := p.Exports["root"]; root != "" {
			if _, err := os.Stat(filepath.Join(root, "blobs")); err != nil {
				return "", err
			}
			s.root = root
			return root, nil
		}
	}
	return "", errors.New("containerd does not keep its content in a directory")
}

func (s *store) forgetRoot() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.root = ""
}

// readAheadSize is how many bytes are read over the content API at once.
const readAheadSize = 1 << 20

// readAhead reads a blob in large pieces for a caller that reads it sequentially in small
// ones. It is not safe for concurrent use.
type readAhead struct {
	content.ReaderAt
	at  int64  // the offset of buf in the blob
	buf []byte // of readAheadSize at most
}

func (r *readAhead) ReadAt(p []byte, off int64) (int, error) {
	if len(p) >= readAheadSize {
		return r.ReaderAt.ReadAt(p, off)
	}
	if off < r.at || off >= r.at+int64(len(r.buf)) {
		if r.buf == nil {
			r.buf = make([]byte, readAheadSize)
		}
		n, err := r.ReaderAt.ReadAt(r.buf[:readAheadSize], off)
		r.at, r.buf = off, r.buf[:n]
		if err == nil && n == 0 {
			err = io.ErrNoProgress
		}
		if err != nil && (err != io.EOF || n == 0) {
			return 0, err
		}
	}
	n := copy(p, r.buf[off-r.at:])
	if n == len(p) {
		return n, nil
	}
	// What is left of p begins where the buffer ends.
	m, err := r.ReadAt(p[n:], off+int64(n))
	return n + m, err
}
