//go:build linux && cgo && !no_pkcs11

package pkcs11

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/ctrlplane/pilot/copilot/kms"
)

// key is a version of a key.
type key struct {
	handle   pkcs11.ObjectHandle
	label    string
	version  int
	encrypts bool
}

// loaded is when this process started, to which a module's view of a token may be
// limited.
var loaded = time.Now()

// maxAge is how old a process may be whose module finds no key at a path.
const maxAge = 30 * time.Second

// keys returns the versions of a key, of which there is at least one, in order.
func (s *session) keys(path string) ([]key, error) {
	keys, skipped, err := s.find(pkcs11.NewAttribute(pkcs11.CKA_LABEL, path))
	if err != nil || len(keys) > 0 {
		return keys, err
	}
	// A token that went away and came back has nothing, as far as some modules
	// know.
	if err := s.present(); err != nil {
		return nil, err
	}
	if !s.hasGCM() {
		return nil, errNoGCM
	}
	err = fmt.Errorf("%w: no AES-256 key with this CKA_LABEL and a CKA_ID from 1%s", kms.ErrNotFound, skipped)
	if time.Since(loaded) > maxAge {
		err = &lostError{err: err, old: true}
	}
	return nil, err
}

// errNoGCM: the token has no mechanism that is as safe. RSA-OAEP does not say who
// wrapped; AES key wrap is bound to neither the KEK nor its version.
var errNoGCM = fmt.Errorf("%w: the token has no CKM_AES_GCM, without which copilot can't use it", kms.ErrUnavailable)

// hasGCM reports whether the token has AES-GCM, or may have it.
func (c *conn) hasGCM() bool {
	_, err := c.GetMechanismInfo(c.slot, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, nil)})
	return !errors.Is(err, pkcs11.Error(pkcs11.CKR_MECHANISM_INVALID))
}

// wrap wraps plaintext with the current version.
func (s *session) wrap(path string, plaintext []byte) (message, error) {
	keys, err := s.keys(path)
	if err != nil {
		return message{}, err
	}
	may := slices.DeleteFunc(slices.Clone(keys), func(k key) bool { return !k.encrypts })
	if len(may) == 0 {
		return message{}, fmt.Errorf("%w: none of its %d versions may encrypt (CKA_ENCRYPT)", kms.ErrForbidden, len(keys))
	}
	current := may[len(may)-1]
	if len(may) > 1 && may[len(may)-2].version == current.version {
		return message{}, fmt.Errorf("%w: it has two keys of version %d: rotate it", kms.ErrUnavailable, current.version)
	}
	wrapped, err := s.seal(current, plaintext, additionalData(path, current.version))
	return message{version: current.version, fields: [][]byte{wrapped}}, err
}

// unwrap undoes wrap.
func (s *session) unwrap(path string, version int, wrapped []byte) (message, error) {
	keys, err := s.keys(path)
	if err != nil {
		return message{}, err
	}
	err = fmt.Errorf("%w: version %d", kms.ErrNotFound, version)
	if time.Since(loaded) > maxAge {
		err = &lostError{err: err, old: true} // another broker may have made it
	}
	// Somebody may have made two of a version.
	for _, k := range keys {
		if k.version == version {
			var plaintext []byte
			if plaintext, err = s.open(k, wrapped, additionalData(path, version)); err == nil {
				return message{version: version, fields: [][]byte{plaintext}}, nil
			}
		}
	}
	return message{}, err
}

// find returns the AES-256 keys that have the attributes given. Skipped describes
// one that can't be used.
func (s *session) find(with ...*pkcs11.Attribute) (keys []key, skipped string, err error) {
	handles, err := s.findHandles(append(with,
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true)))
	if err != nil {
		return nil, "", callError("look for the key", err)
	}
	for _, handle := range handles {
		attributes, err := s.GetAttributeValue(s.handle, handle, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, nil),
			pkcs11.NewAttribute(pkcs11.CKA_ID, nil),
			pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, nil),
			pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, nil),
		})
		if errors.Is(err, pkcs11.Error(pkcs11.CKR_OBJECT_HANDLE_INVALID)) {
			continue // destroyed meanwhile
		}
		if err != nil {
			return nil, "", callError("read the key's attributes", err)
		}
		label, id, size, encrypt := attributes[0].Value, attributes[1].Value, attributes[2].Value, attributes[3].Value
		version, ok := parseVersion(id)
		if !ok {
			skipped = fmt.Sprintf(" (but one with CKA_ID %x)", id)
			continue
		}
		if !slices.Equal(size, pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32).Value) {
			skipped = fmt.Sprintf(" (but one of another size, with CKA_ID %x)", id)
			continue
		}
		keys = append(keys, key{handle, string(label), version, len(encrypt) == 1 && encrypt[0] != 0})
	}
	slices.SortFunc(keys, func(a, b key) int { return a.version - b.version })
	return keys, skipped, nil
}

func (s *session) findHandles(with []*pkcs11.Attribute) (handles []pkcs11.ObjectHandle, err error) {
	if err := s.FindObjectsInit(s.handle, with); err != nil {
		return nil, err
	}
	for {
		some, _, err := s.FindObjects(s.handle, 64)
		if err != nil {
			return nil, err
		}
		if len(some) == 0 {
			return handles, s.FindObjectsFinal(s.handle)
		}
		handles = append(handles, some...)
	}
}

// parseVersion reads a CKA_ID.
func parseVersion(id []byte) (version int, ok bool) {
	id = bytes.TrimLeft(id, "\x00")
	if len(id) == 0 || len(id) > 4 {
		return 0, false
	}
	var b [4]byte
	copy(b[4-len(id):], id)
	v := binary.BigEndian.Uint32(b[:])
	return int(v), v < math.MaxInt32
}

func formatVersion(version int) []byte {
	return bytes.TrimLeft(binary.BigEndian.AppendUint32(nil, uint32(version)), "\x00")
}

// seal wraps plaintext.
func (s *session) seal(k key, plaintext, aad []byte) ([]byte, error) {
	nonce := make([]byte, gcmNonce)
	rand.Read(nonce) // never fails
	used, sealed, err := s.encrypt(k, nonce, plaintext, aad)
	if errors.Is(err, pkcs11.Error(pkcs11.CKR_MECHANISM_PARAM_INVALID)) || errors.Is(err, pkcs11.Error(pkcs11.CKR_ARGUMENTS_BAD)) {
		// AWS CloudHSM makes the nonce itself, and takes zeros only to write it
		// to.
		clear(nonce)
		if used, sealed, err = s.encrypt(k, nonce, plaintext, aad); err == nil && bytes.Equal(used, nonce) {
			return nil, fmt.Errorf("%w: the HSM takes no random nonce for CKM_AES_GCM and makes none", kms.ErrUnavailable)
		}
	}
	if errors.Is(err, pkcs11.Error(pkcs11.CKR_MECHANISM_INVALID)) {
		return nil, errNoGCM
	}
	if err != nil {
		return nil, callError("wrap", err)
	}
	if len(used) != gcmNonce || len(sealed) != len(plaintext)+gcmTag {
		return nil, fmt.Errorf("%w: for %d bytes the HSM's CKM_AES_GCM gave a nonce of %d and a ciphertext of %d bytes, not of %d and %d",
			kms.ErrUnavailable, len(plaintext), len(used), len(sealed), gcmNonce, len(plaintext)+gcmTag)
	}
	return append(used, sealed...), nil
}

// encrypt returns also the nonce that was used. Some HSMs make their own.
func (s *session) encrypt(k key, nonce, plaintext, aad []byte) (used, sealed []byte, err error) {
	params := pkcs11.NewGCMParams(nonce, aad, gcmTag*8)
	defer params.Free()
	if err = s.EncryptInit(s.handle, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}, k.handle); err != nil {
		return nil, nil, err
	}
	sealed, err = s.functions.encrypt(s.handle, plaintext)
	return params.IV(), sealed, err
}

// open undoes seal.
func (s *session) open(k key, wrapped, aad []byte) ([]byte, error) {
	params := pkcs11.NewGCMParams(wrapped[:gcmNonce], aad, gcmTag*8)
	defer params.Free()
	if err := s.DecryptInit(s.handle, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}, k.handle); err != nil {
		return nil, callError("unwrap", err)
	}
	plaintext, err := s.Decrypt(s.handle, wrapped[gcmNonce:])
	if err == nil {
		return plaintext, nil
	}
	if err, ok := errors.AsType[*lostError](callError("unwrap", err)); ok && !vague(err) {
		return nil, err
	}
	// Modules have many codes for a wrong tag. SoftHSM has CKR_GENERAL_ERROR,
	// which it also has for a token that is gone.
	if err := s.present(); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("%w (%s)", kms.ErrUnwrap, codeName(err))
}
