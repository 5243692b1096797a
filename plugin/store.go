package plugin

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
)

// localStore is containerd's content store, with blobs read from its files.
// Over the content API each read is a call, which makes a pull several times
// slower.
type localStore struct {
	content.Store
	blobs string // the directory with one directory for each digest algorithm
}

// LocalStore returns store, a client of the content API, reading blobs from
// containerd's root directory, such as /var/lib/containerd, where it can: when
// it may and containerd keeps its content there.
func LocalStore(store content.Store, root string) content.Store {
	return &localStore{store, filepath.Join(root, "io.containerd.content.v1.content", "blobs")}
}

// ReaderAt opens the blob's file after asking containerd that the blob is
// there in the caller's namespace, since the file says nothing of that.
func (s *localStore) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("blob %.80q: %w", desc.Digest, err)
	}
	info, err := s.Info(ctx, desc.Digest)
	if err != nil {
		return nil, err
	}
	name := filepath.Join(s.blobs, desc.Digest.Algorithm().String(), desc.Digest.Encoded())
	ra, err := local.OpenReader(name)
	if err == nil && ra.Size() == info.Size {
		return ra, nil
	}
	if err == nil {
		ra.Close()
		err = fmt.Errorf("it has %d bytes, and containerd says %d", ra.Size(), info.Size)
	}
	if !os.IsNotExist(err) {
		logrus.WithError(err).WithField("digest", desc.Digest).Debug("blob is read over the content API")
	}
	return s.Store.ReaderAt(ctx, desc)
}
