package pull

import (
	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/opencontainers/go-digest"
)

// addLayer adds a layer that is a tar file, and returns its descriptor and diff ID.
func addLayer(l *harness.Layout, mediaType string, b []byte) (harness.Object, string) {
	return l.Blob(mediaType, b), digest.FromBytes(b).String()
}
