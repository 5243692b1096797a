// Package fipstest says which tests are of what FIPS 140-3 does not allow: "make test-fips"
// runs all tests with GODEBUG=fips140=only.
package fipstest

import (
	"cmp"
	"crypto/fips140"
	"fmt"
	"os"
	"strings"
	"testing"
)

// Refusal is something that programs refuse with GODEBUG=fips140=only.
type Refusal string

// What is refused. TestRefusedInFIPSOnlyMode in integration/fips shows for each how.
const (
	JWE        Refusal = "JWE"
	PKCS7      Refusal = "PKCS #7"
	PGP        Refusal = "OpenPGP"
	SHA1OAEP   Refusal = "RSA-OAEP with SHA-1 in PKCS #11"
	PrivateKey Refusal = "private keys in files"
	Age        Refusal = "age"
	Backup     Refusal = "backups, which are in age's format"
	Original   Refusal = "the original's format"
	HPKE       Refusal = "HPKE with the module v1.0.0"
	TPM        Refusal = "TPMs"
	MD5        Refusal = "PostgreSQL's authentication by MD5"
	AzureCert  Refusal = "Azure's logins by certificate"
)

// Peer is the library with which a test compares pilot.
const Peer Refusal = "the library to compare with"

// All are all that pilot refuses.
var All = []Refusal{JWE, PKCS7, PGP, SHA1OAEP, PrivateKey, Age, Backup, Original, HPKE, TPM, MD5, AzureCert}

// Variable is set where the programs of the integration tests run in that mode.
const Variable = "PILOT_FIPS"

// Only reports whether the code that a test is of runs in that mode: in the test's process,
// or in programs that it starts.
func Only() bool { return fips140.Enforced() || os.Getenv(Variable) != "" }

// Is reports whether something is refused in this run.
func Is(what Refusal) bool {
	newer := !strings.HasPrefix(cmp.Or(os.Getenv("GOFIPS140"), fips140.Version()), "v1.0")
	return Only() && !(what == HPKE && newer)
}

// Refused skips a test of what is refused in that mode.
func Refused(t testing.TB, what Refusal) {
	t.Helper()
	if Is(what) {
		t.Skipf("%s: refused in FIPS 140-3's only mode, as TestRefusedInFIPSOnlyMode shows", what)
	}
}

// Condition is for lines of scripts that are about what is refused in that mode, or are not:
// [refused:jwe], [!refused:hpke].
func Condition(name string) (bool, error) {
	what, ok := map[string]Refusal{"refused:jwe": JWE, "refused:hpke": HPKE, "refused:tpm": TPM, "refused:original": Original}[name]
	if !ok {
		return false, fmt.Errorf("unknown condition %q", name)
	}
	return Is(what), nil
}
