package keyring

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/kms"
)

func TestVerdictIsDeniedOnlyIfTheBrokerWorks(t *testing.T) {
	for _, test := range []struct {
		err  error
		want string
	}{
		{keystore.ErrNotFound, audit.Denied},
		{keystore.ErrDisabled, audit.Denied},
		{ErrNotExported, audit.Denied},
		{fmt.Errorf("%w: %w", ErrLimit, kms.ErrForbidden), audit.Denied},
		{kms.ErrForbidden, audit.Failed},
		{fmt.Errorf("%w: %w", kms.ErrUnavailable, kms.ErrNotFound), audit.Failed},
		{errors.Join(keystore.ErrNotFound, audit.ErrUnavailable), audit.Failed},
		{keystore.ErrInput, audit.Failed},
		{errors.New("unknown"), audit.Failed},
	} {
		if got := Verdict(test.err); got != test.want {
			t.Errorf("%v: %s, want %s", test.err, got, test.want)
		}
	}
}

// TestWaitForARotationEndsWithTheRequest has another rotation under way that never ends.
func TestWaitForARotationEndsWithTheRequest(t *testing.T) {
	r := &Keyring{rotating: make(chan struct{}, 1)}
	r.rotating <- struct{}{}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.rotateFull(ctx, KEK{}, 1); !errors.Is(err, context.Canceled) || !errors.Is(err, kms.ErrUnavailable) {
		t.Error(err)
	}
}
