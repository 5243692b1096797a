package mirror

import (
	"fmt"

	"github.com/opencontainers/go-digest"

	"github.com/ctrlplane/pilot/internal/layerkeys"
)

// record notes which key has opened a layer, under the diff ID by which its snapshot is
// shared. Nothing of a layer is served that can't be recorded. plain is the digest of the
// plain blob, or "" unless all of it was read.
func (m *Mirror) record(layer *lazyLayer, basis layerkeys.Basis, plain digest.Digest) error {
	if m.conf.Record == nil {
		return nil
	}
	layer.mu.Lock()
	by, fingerprint := layer.openedBy, layer.fingerprint
	layer.mu.Unlock()
	if plain != "" {
		by = by.Vouching(plain, layer.sealed.DiffID)
	}
	blob := layerkeys.Opened(layer.desc.Digest, basis, by, fingerprint)
	blob.Plain = plain
	if err := m.conf.Record.Add(layer.sealed.DiffID, blob); err != nil {
		return &notLazy{reasonRecord, fmt.Errorf("pilot can't record which key it needs: %w", err)}
	}
	return nil
}

// withdraw removes from the record what was sealed of a layer and is not true. The layer's
// snapshot is of no use, and who has sealed it must not decide over those that are.
func (m *Mirror) withdraw(layer *lazyLayer) {
	if m.conf.Record == nil {
		return
	}
	layer.mu.Lock()
	fingerprint := layer.fingerprint
	layer.mu.Unlock()
	_ = m.conf.Record.Withdraw(layer.sealed.DiffID, layer.desc.Digest, fingerprint) // saved with the next change
}
