package keystore

import (
	"errors"
	"path/filepath"
	"testing"
)

// TestAuditHeadChanged changes what the store has of an audit log.
func TestAuditHeadChanged(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s, err := Open(t.Context(), dir, "")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, chain := range []string{"a", "b"} {
		if err := s.NoteAuditHead(t.Context(), AuditHead{Chain: chain, Seq: 7, MAC: "m", Log: "l"}); err != nil {
			t.Fatal(err)
		}
	}
	if heads, err := s.AuditHeads(t.Context()); err != nil || len(heads) != 2 {
		t.Fatalf("%v %v", heads, err)
	}
	var other []byte
	if err := s.db.named(t.Context(), auditHead+"a", func(_ string, b []byte) error { other = b; return nil }); err != nil {
		t.Fatal(err)
	}
	for _, changed := range [][]byte{other, other[:len(other)-1], nil} {
		if err := s.db.keep(t.Context(), auditHead+"b", func(_, _ []byte) ([]byte, error) { return append([]byte{}, changed...), nil }); err != nil {
			t.Fatal(err)
		}
		if _, err := s.AuditHeads(t.Context()); !errors.Is(err, ErrAuditHead) {
			t.Errorf("%x: %v", changed, err)
		}
	}
}
