package processor

import (
	"bytes"
	"context"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containers/ocicrypt/keywrap/pgp"
	"github.com/go-jose/go-jose/v4"
)

// MaxWrappedKeys bounds the wrapped keys of one layer that [Unwrap] tries, all
// schemes together, since anyone who can write the image can add some. A wrapped
// key is one of the values, with commas between them, of a key annotation, and may
// be for several recipients. [LayerKey.Wrap] writes no more.
const MaxWrappedKeys = 64

const (
	// jweRecipients is how many recipients a JWE gets. Readers with go-jose
	// 4.1.9 and later refuse to parse more than 32.
	jweRecipients = 32
	// maxJWERecipients bounds the recipients of a JWE that is read. Earlier
	// versions of go-jose have no bound, so skopeo and imgcrypt write one JWE
	// however many recipients there are.
	maxJWERecipients = 1024
)

func init() { jose.MaxRecipients = maxJWERecipients }

// ErrTooManyRecipients is the error of a layer that would get wrapped keys that no
// reader tries.
var ErrTooManyRecipients = errors.New("too many recipients")

// CheckWrappedKeys reports whether all wrapped keys in the annotations of a layer
// are tried when it is decrypted. The error wraps [ErrTooManyRecipients].
func CheckWrappedKeys(annotations map[string]string) error {
	n := 0
	for key, value := range annotations {
		if strings.HasPrefix(key, annotationKeysPrefix) && value != "" {
			n += strings.Count(value, ",") + 1
		}
	}
	if n <= MaxWrappedKeys {
		return nil
	}
	return fmt.Errorf("%w: the layer would have %d wrapped keys, and only %d are tried when it is decrypted: "+
		"name several recipients in one command, which share one, or remove some with \"ctr-pilot images rewrap --remove\"",
		ErrTooManyRecipients, n, MaxWrappedKeys)
}

// distinct returns the parameters with each value once, however often a recipient is named.
func distinct(params map[string][][]byte) map[string][][]byte {
	out := make(map[string][][]byte, len(params))
	for name, values := range params {
		for _, v := range values {
			if !slices.ContainsFunc(out[name], func(had []byte) bool { return bytes.Equal(had, v) }) {
				out[name] = append(out[name], v)
			}
		}
	}
	return out
}

// notReplaced returns the values of had, an annotation of a scheme, that added does not
// replace: those that are for somebody else too.
//
// Only OpenPGP names the recipient of a wrapped key, by a hash of the recipient's key. JWE
// and PKCS #11 do not. PKCS #7 names the certificate's issuer and serial number, which
// self-signed certificates with different keys can share.
func notReplaced(scheme, had, added string) string {
	if scheme != "pgp" || had == "" {
		return had
	}
	openpgp := pgp.NewKeyWrapper()
	now, err := openpgp.GetKeyIdsFromPacket(added)
	if err != nil {
		return had
	}
	var kept []string
	for value := range strings.SplitSeq(had, ",") {
		ids, err := openpgp.GetKeyIdsFromPacket(value)
		// The ID 0 hides who the recipient is: RFC 9580, section 5.1.
		if err != nil || len(ids) == 0 || slices.ContainsFunc(ids, func(id uint64) bool { return id == 0 || !slices.Contains(now, id) }) {
			kept = append(kept, value)
		}
	}
	return strings.Join(kept, ",")
}

// split returns the parameters that a scheme wraps for, in as many parts as it writes
// wrapped keys.
func split(scheme string, params map[string][][]byte) []map[string][][]byte {
	keys := params["pubkeys"]
	if scheme != "jwe" || len(keys) <= jweRecipients {
		return []map[string][][]byte{params}
	}
	var parts []map[string][][]byte
	for chunk := range slices.Chunk(keys, jweRecipients) {
		parts = append(parts, map[string][][]byte{"pubkeys": chunk})
	}
	return parts
}

// JWE algorithms, as ocicrypt reads them.
var (
	jweKeyAlgorithms = []jose.KeyAlgorithm{jose.RSA_OAEP, jose.RSA_OAEP_256, jose.ECDH_ES_A128KW, jose.ECDH_ES_A192KW, jose.ECDH_ES_A256KW}
	jweEncryptions   = []jose.ContentEncryption{jose.A256GCM}
)

// readBack checks that a wrapped key can be read, and that it unwraps to private if
// params have a key for it. A key provider is not asked: not everybody who may wrap may
// unwrap, and the broker's audit log would have a denial for each layer.
func readBack(ctx context.Context, scheme string, w wrapper, params map[string][][]byte, wrapped, private []byte) error {
	if strings.HasPrefix(scheme, providerScheme) {
		return nil
	}
	if scheme == "jwe" {
		if _, err := jose.ParseEncryptedJSON(string(wrapped), jweKeyAlgorithms, jweEncryptions); err != nil {
			return fmt.Errorf("what was written can't be read: %w", err)
		}
	}
	if !w.possible(params) {
		return nil
	}
	got, err := w.unwrap(ctx, params, wrapped)
	if err != nil {
		return ctx.Err() // the keys may be those of other recipients
	}
	defer clear(got)
	if subtle.ConstantTimeCompare(got, private) != 1 {
		return errors.New("what was written unwraps to another key")
	}
	return nil
}

// wrapAll wraps private with one scheme and returns the value of its annotation.
func wrapAll(ctx context.Context, scheme string, to Recipients, private []byte) (string, error) {
	w, err := to.wrapper(scheme)
	if err != nil {
		return "", err
	}
	params := distinct(to.Parameters)
	if conf, ok := to.private().Parameters["pkcs11-config"]; ok && scheme == "pkcs11" {
		params["pkcs11-config"] = conf // says which modules may be loaded
	}
	var values [][]byte
	for _, part := range split(scheme, params) {
		wrapped, err := w.wrap(ctx, part, private)
		if err == nil && len(wrapped) == 0 {
			err = errors.New("it returned nothing")
		}
		if err == nil {
			err = readBack(ctx, scheme, w, to.private().Parameters, wrapped, private)
		}
		if err != nil {
			return "", fmt.Errorf("wrap the layer key with %s: %w", scheme, late(err))
		}
		values = append(values, base64.StdEncoding.AppendEncode(nil, wrapped))
	}
	return string(bytes.Join(values, []byte(","))), nil
}
