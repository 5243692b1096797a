package processor

import (
	"crypto/fips140"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/fips"
)

// TestRefusedInFIPSOnlyMode runs itself again where Go refuses what FIPS 140-3 does not
// approve, and panics at some of it: files that a node has among its keys do no harm there.
func TestRefusedInFIPSOnlyMode(t *testing.T) {
	if !fips140.Enforced() {
		cmd := exec.Command(os.Args[0], "-test.run=^TestRefusedInFIPSOnlyMode$", "-test.v")
		cmd.Env = append(os.Environ(), "GODEBUG=fips140=only")
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS") {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	dir := t.TempDir()
	for name, b := range map[string]string{
		"jwk":     `{"kty":"EC","crv":"P-256","x5c":["MIIB"],"x5t":"AAAA"}`,
		"openpgp": "\x99\x01\x0d\x04garbage",
		"pem": string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: []byte("garbage"),
			Headers: map[string]string{"Proc-Type": "4,ENCRYPTED", "DEK-Info": "AES-256-CBC,00000000000000000000000000000000"}})),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	keys := NewKeyDir(dir, nil)
	state, err := keys.State(t.Context())
	if err != nil || state.Usable != 0 || len(state.Unusable) != 3 {
		t.Fatalf("%+v, %v", state, err)
	}
	for _, k := range state.Unusable {
		if !strings.Contains(k.Reason, fips.ErrNotApproved.Error()) {
			t.Errorf("%s: %s", k.Path, k.Reason)
		}
	}
	for hash, refused := range map[string]bool{"sha1": true, "SHA1": true, "SHA256": false, "": false} {
		t.Setenv("OCICRYPT_OAEP_HASHALG", hash) // of which ocicrypt ignores the case
		if err := CheckScheme("pkcs11"); errors.Is(err, fips.ErrNotApproved) != refused {
			t.Errorf("pkcs11 with %q: %v", hash, err)
		}
	}
	for _, scheme := range []string{"jwe", "pkcs7", "pgp"} {
		if err := CheckScheme(scheme); !errors.Is(err, fips.ErrNotApproved) {
			t.Errorf("%s: %v", scheme, err)
		}
		layer := ocispec.Descriptor{Annotations: map[string]string{annotationKeysPrefix + scheme: "AAAA"}}
		if _, err := keys.Unwrap(t.Context(), Keys{}, layer); !errors.Is(err, ErrNoKey) || !strings.Contains(err.Error(), "use a KEK") {
			t.Errorf("%s: %v", scheme, err)
		}
	}
}
