//go:build !no_vault

package vault

import (
	"context"
	"errors"
	"testing"

	"github.com/ctrlplane/pilot/copilot/kms"
)

// TestVaultTransitWaitForARotationEndsWithTheCall has another rotation under way that
// never ends.
func TestVaultTransitWaitForARotationEndsWithTheCall(t *testing.T) {
	k := transit{&engine{mount: "transit"}, make(chan struct{}, 1)}
	k.rotating <- struct{}{}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := k.Rotate(ctx, "a"); !errors.Is(err, context.Canceled) || !errors.Is(err, kms.ErrUnavailable) {
		t.Error(err)
	}
}
