package image

import (
	"context"

	"github.com/containerd/containerd/v2/core/content"
)

// Store has the blobs of images. Every [content.Store] is one. An error for a blob that
// is not there wraps errdefs.ErrNotFound.
type Store interface {
	content.Provider
	content.InfoProvider
	content.Ingester
	// Abort removes what a writer with this ref has written and not committed.
	Abort(ctx context.Context, ref string) error
	// Update sets labels of a blob: they keep containerd's garbage collector from
	// what a document refers to. A store without labels returns an error that wraps
	// errdefs.ErrFailedPrecondition or errdefs.ErrNotImplemented, which is ignored.
	Update(ctx context.Context, info content.Info, fieldpaths ...string) (content.Info, error)
}
