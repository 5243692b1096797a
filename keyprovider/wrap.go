package keyprovider

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/aesgcm"
	"github.com/ctrlplane/pilot/internal/fips"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// errWrongKEK says that a KEK does not open an annotation.
var errWrongKEK = errors.New("does not unwrap this layer key: the KEK was replaced by another of that name, or the annotation was changed")

// wrap wraps optsdata, the layer key in ocicrypt's JSON, with kek, in
// FormatA256GCMKW or FormatOriginal.
func wrap(kek client.KEK, format Format, optsdata []byte) (wireformat.Annotation, error) {
	if format == FormatOriginal {
		return sealOriginal(kek, optsdata)
	}
	if len(kek.Key) != wireformat.KEKSize {
		return wireformat.Annotation{}, fmt.Errorf("%w: KEK %q has %d bytes, and %s takes %d: create a KEK of that size, or write the original's format", ErrInput, kek.ID, len(kek.Key), FormatA256GCMKW, wireformat.KEKSize)
	}
	a := wireformat.Annotation{Method: wireformat.MethodA256GCMKW, KEKID: kek.ID, KEKVersion: kek.Version}
	aead, err := aesgcm.New(kek.Key)
	if err != nil {
		return wireformat.Annotation{}, fmt.Errorf("KEK %q: %w", kek.ID, err)
	}
	sealed := aead.Seal(nil, nil, optsdata, a.AdditionalData())
	a.IV, a.WrappedKey = sealed[:wireformat.IVSize:wireformat.IVSize], sealed[wireformat.IVSize:]
	return a, nil
}

// unwrap returns the optsdata that a holds, whose method is A256GCMKW or the original's, or
// errWrongKEK.
func unwrap(kek client.KEK, a wireformat.Annotation) ([]byte, error) {
	if a.Method == wireformat.MethodAESGCM {
		return openOriginal(kek, a)
	}
	if len(kek.Key) != wireformat.KEKSize {
		return nil, fmt.Errorf("has %d bytes, and %s takes %d", len(kek.Key), a.Method, wireformat.KEKSize)
	}
	aead, err := aesgcm.New(kek.Key)
	if err != nil {
		return nil, err
	}
	optsdata, err := aead.Open(nil, nil, slices.Concat(a.IV, a.WrappedKey), a.AdditionalData())
	if err != nil {
		return nil, errWrongKEK
	}
	return optsdata, nil
}

func sealOriginal(kek client.KEK, optsdata []byte) (wireformat.Annotation, error) {
	aead, err := newOriginalGCM(kek.Key, wireformat.OriginalIVSize)
	if err != nil {
		return wireformat.Annotation{}, fmt.Errorf("KEK %q: %w", kek.ID, err)
	}
	a := wireformat.Annotation{Method: wireformat.MethodAESGCM, IV: make([]byte, wireformat.OriginalIVSize)}
	rand.Read(a.IV) // never fails
	a.WrappedKey = aead.Seal(nil, a.IV, optsdata, nil)
	return a, nil
}

func openOriginal(kek client.KEK, a wireformat.Annotation) ([]byte, error) {
	aead, err := newOriginalGCM(kek.Key, len(a.IV))
	if err != nil {
		return nil, err
	}
	optsdata, err := aead.Open(nil, a.IV, a.WrappedKey, nil)
	if err != nil {
		return nil, errWrongKEK
	}
	return optsdata, nil
}

// refuseOriginal is the error of the original's format where its IV is not allowed.
func refuseOriginal() error {
	return fips.Refuse("the original's format has IVs of 16 bytes",
		"write A256GCMKW, and move images to it on a machine without that setting (ctr-pilot images rewrap)")
}

// newOriginalGCM returns the cipher of the original's format. Go's approved AES-GCM has no
// IVs of that size.
func newOriginalGCM(key []byte, ivSize int) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("has %d bytes, not 16, 24 or 32", len(key))
	}
	return cipher.NewGCMWithNonceSize(block, ivSize)
}
