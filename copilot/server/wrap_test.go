package server_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/copilot/server"
)

// TestLargestPlaintextIsWrapped wraps the largest plaintext, and one that is a byte
// longer.
func TestLargestPlaintextIsWrapped(t *testing.T) {
	dir := t.TempDir()
	create(t, dir, map[string][]byte{"team-a": nil})
	c, err := client.New(client.Config{URLs: []string{serve(t, dir, server.Config{})}, Timeout: time.Minute})
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

// TestBrokerUnwrapsWhatPilotWrapped unwraps what pilot has wrapped itself.
func TestBrokerUnwrapsWhatPilotWrapped(t *testing.T) {
	dir := t.TempDir()
	key := bytes.Repeat([]byte("k"), 32)
	create(t, dir, map[string][]byte{"team/a": bytes.Clone(key), "team-b": bytes.Clone(key)})
	url := serve(t, dir, server.Config{})
	iv, sealed := sealAnnotation(t, key, `{"kekId":"team/a","kekVersion":1,"method":"A256GCMKW"}`, []byte("a layer key"))
	body := func(version int, iv, sealed []byte, method string) string {
		b, err := json.Marshal(map[string]any{"version": version, "iv": iv, "wrappedKey": sealed, "method": method})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	unwrap := func(id, body string) (int, string) {
		t.Helper()
		return request(t, url, "POST", "/api/v2/keks/"+id+"/unwrap", body)
	}
	if status, answer := unwrap("team%2Fa", body(1, iv, sealed, "A256GCMKW")); status != 200 || answer != `{"plaintext":"YSBsYXllciBrZXk="}` {
		t.Errorf("%d %s", status, answer)
	}
	if status, _ := unwrap("team-b", body(1, iv, sealed, "A256GCMKW")); status != 400 {
		t.Errorf("with another KEK that has the same key: %d", status)
	}
	for name, b := range map[string]string{
		"an iv of 16 bytes": body(1, append(iv, 1, 2, 3, 4), sealed, "A256GCMKW"),
		"no method":         body(1, iv, sealed, ""),
		"another method":    body(1, iv, sealed, "AES-GCM"),
		"changed":           body(1, iv, append([]byte{sealed[0] ^ 1}, sealed[1:]...), "A256GCMKW"),
		"too short":         body(1, iv, nil, "A256GCMKW"),
		"no iv":             body(1, nil, sealed, "A256GCMKW"),
	} {
		if status, answer := unwrap("team%2Fa", b); status != 400 {
			t.Errorf("%s: %d %s", name, status, answer)
		}
	}
}

// sealAnnotation wraps a key as pilot does.
func sealAnnotation(t *testing.T, key []byte, additional string, plaintext []byte) (iv, sealed []byte) {
	t.Helper()
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		t.Fatal(err)
	}
	sealed = aead.Seal(nil, nil, plaintext, []byte(additional))
	return sealed[:12:12], sealed[12:]
}

// TestBrokerWrapsForGuestsOfConfidentialContainers wraps in the one form without additional
// data, and unwraps it, and takes neither form for the other.
func TestBrokerWrapsForGuestsOfConfidentialContainers(t *testing.T) {
	dir := t.TempDir()
	key := bytes.Repeat([]byte("k"), 32)
	create(t, dir, map[string][]byte{"team-a": bytes.Clone(key)})
	url := serve(t, dir, server.Config{})
	c, err := client.New(client.Config{URLs: []string{url}, Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	w, err := c.WrapCoCo(t.Context(), "team-a", []byte("a layer key"))
	if err != nil || w.Method != "A256GCM" || w.Version != 1 {
		t.Fatalf("%+v, %v", w, err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := gcm.Open(nil, w.IV, w.Key, nil); err != nil || string(got) != "a layer key" {
		t.Errorf("a guest unwraps %q, %v", got, err)
	}
	if got, err := c.Unwrap(t.Context(), "team-a", w); err != nil || string(got) != "a layer key" {
		t.Errorf("the broker unwraps %q, %v", got, err)
	}
	w.Method = "A256GCMKW"
	if got, err := c.Unwrap(t.Context(), "team-a", w); !errors.Is(err, client.ErrRejected) {
		t.Errorf("as A256GCMKW: %q, %v", got, err)
	}
	own, err := c.Wrap(t.Context(), "team-a", []byte("a layer key"))
	if err != nil {
		t.Fatal(err)
	}
	own.Method = "A256GCM"
	if got, err := c.Unwrap(t.Context(), "team-a", own); !errors.Is(err, client.ErrRejected) {
		t.Errorf("A256GCMKW as A256GCM: %q, %v", got, err)
	}
	if status, answer := request(t, url, "POST", "/api/v2/keks/team-a/wrap", `{"plaintext":"AAAA","method":"A256CTR"}`); status != 400 || !strings.Contains(answer, "is not A256GCM") {
		t.Errorf("A256CTR: %d %s", status, answer)
	}
}
