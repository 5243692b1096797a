package processor

import (
	"bytes"
	"testing"
)

func TestDerivedKeysDependOnLayerKeyAndPurpose(t *testing.T) {
	a, b := NewLayerKey(""), NewLayerKey("")
	first := a.Derive("one")
	if len(first) != 32 || !bytes.Equal(first, a.Derive("one")) {
		t.Errorf("%d bytes, and then others", len(first))
	}
	if bytes.Equal(first, a.Derive("two")) || bytes.Equal(first, b.Derive("one")) || bytes.Equal(first, a.key) {
		t.Error("keys for different purposes or layers are the same")
	}
}
