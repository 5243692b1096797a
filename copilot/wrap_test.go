package copilot_test

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/copilot"
	client "github.com/ctrlplane/pilot/keyprovider/copilot"
)

// TestWrapLargest wraps as much as fits, and a byte more.
func TestWrapLargest(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	c, err := client.New(client.Config{URLs: []string{serve(t, dir, copilot.Config{})}, Timeout: 2 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	plaintext := bytes.Repeat([]byte("p"), 65536)
	wrapped, err := c.Wrap(t.Context(), "team-a", plaintext)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := c.Unwrap(t.Context(), "team-a", wrapped); err != nil || !bytes.Equal(got, plaintext) {
		t.Errorf("unwrap: %d bytes, %v", len(got), err)
	}
	if _, err := c.Wrap(t.Context(), "team-a", append(plaintext, 'p')); err == nil || !strings.Contains(err.Error(), "plaintext has 65537 bytes, not 1 to 65536") {
		t.Errorf("65537 bytes: %v", err)
	}
}
