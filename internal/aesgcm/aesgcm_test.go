package aesgcm

import (
	"bytes"
	"encoding/hex"
	"os"
	"os/exec"
	"testing"
)

// earlier was sealed by a copilot that chose the nonce itself, with cipher.NewGCM.
const earlier = "bd4433adfee2a326c83a575fc72fe81d3f75367f9e821b0456430d1e3693acb7c35a5e53414c6d5e18db9ed7af660c2bcba0f8a11d041394"

func TestOpensWhatWasSealedWithANonceOfItsOwn(t *testing.T) {
	aead, err := New(bytes.Repeat([]byte{7}, 32))
	if err != nil {
		t.Fatal(err)
	}
	b, err := hex.DecodeString(earlier)
	if err != nil {
		t.Fatal(err)
	}
	place := []byte("kek 1 team-a")
	if got, err := aead.Open(nil, nil, b, place); err != nil || string(got) != "sealed by an earlier copilot" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := aead.Open(nil, nil, b, []byte("kek 2 team-a")); err == nil {
		t.Error("opened in another place")
	}
	for n := range len(b) {
		if _, err := aead.Open(nil, nil, b[:n], place); err == nil {
			t.Errorf("opened the first %d bytes of %d", n, len(b))
		}
	}
	again := aead.Seal(nil, nil, []byte("sealed by an earlier copilot"), place)
	if len(again) != len(b) || bytes.Equal(again[:12], b[:12]) {
		t.Errorf("seals %d bytes, %x, not %d with a nonce of their own", len(again), again, len(b))
	}
}

// TestWorksInFIPSOnlyMode runs the test above where Go refuses what FIPS 140-3 does not
// approve, which is set when a program starts.
func TestWorksInFIPSOnlyMode(t *testing.T) {
	cmd := exec.Command(os.Args[0], "-test.run=^TestOpensWhatWasSealedWithANonceOfItsOwn$", "-test.v")
	cmd.Env = append(os.Environ(), "GODEBUG=fips140=only")
	if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS")) {
		t.Errorf("%v\n%s", err, out)
	}
}
