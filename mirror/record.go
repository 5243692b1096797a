package mirror

import (
	"fmt"

	"github.com/ctrlplane/pilot/internal/layerkeys"
)

// record notes which key has opened a layer, under the diff ID by which its snapshot is
// shared. Nothing of a layer is served that can't be recorded.
func (m *Mirror) record(layer *lazyLayer, basis layerkeys.Basis) error {
	if m.conf.Record == nil {
		return nil
	}
	layer.mu.Lock()
	blob := layerkeys.Opened(layer.desc.Digest, basis, layer.openedBy, layer.fingerprint)
	layer.mu.Unlock()
	if err := m.conf.Record.Add(layer.sealed.DiffID, blob); err != nil {
		return &notLazy{reasonRecord, fmt.Errorf("pilot can't record which key it needs: %w", err)}
	}
	return nil
}

// withdraw removes from the record what was sealed of a layer and is not true. The layer's
// snapshot is of no use, and who has sealed it must not decide over those that are.
func (m *Mirror) withdraw(layer *lazyLayer) {
	if m.conf.Record != nil {
		_ = m.conf.Record.Withdraw(layer.sealed.DiffID, layer.desc.Digest) // saved with the next change
	}
}
