package processor

import (
	"bytes"
	"os"
	"strings"

	"github.com/containers/ocicrypt/utils"

	"github.com/ctrlplane/pilot/internal/fips"
)

// CheckScheme returns nil if layer keys may be wrapped and unwrapped with one of ocicrypt's
// schemes, such as jwe. Otherwise its error wraps [fips.ErrNotApproved].
func CheckScheme(scheme string) error {
	const instead = "use a KEK (--recipient provider:pilot:KEK)"
	switch scheme {
	case "jwe":
		return fips.Refuse("ocicrypt's JWE has AES-GCM with nonces that no approved module has chosen, and RSA-OAEP with SHA-1", instead)
	case "pkcs7":
		return fips.Refuse("ocicrypt's PKCS #7 has RSA with the padding of PKCS #1 v1.5", instead)
	case "pgp":
		return fips.Refuse("OpenPGP has SHA-1", instead)
	case "pkcs11":
		if strings.EqualFold(os.Getenv("OCICRYPT_OAEP_HASHALG"), "sha1") {
			return fips.Refuse("OCICRYPT_OAEP_HASHALG is sha1", "unset it, for SHA-256")
		}
	}
	return nil
}

// CheckPrivateKey returns nil if a private key or certificate is for a scheme that
// [CheckScheme] allows.
func CheckPrivateKey(b []byte) error {
	if bytes.Contains(b, []byte("pkcs11")) && utils.IsPkcs11PrivateKey(b) {
		return nil
	}
	return fips.Refuse("private keys in files are for JWE, PKCS #7 and OpenPGP", "use a KEK, or a key in a PKCS #11 module")
}
