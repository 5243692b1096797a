package kms_test

import (
	"testing"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/copilot/kms/kmstest"
)

func TestUnknownTypeIsRefusedWithTheKnownOnes(t *testing.T) {
	open := func(kms.Settings) (kms.Backend, error) { return nil, nil }
	kmstest.Opens(t, kms.Types{"b": open, "a": open}, "typo", "", `unknown backend type "typo": this copilot has a, b`)
}
