//go:build linux && cgo && !no_pkcs11

package pkcs11

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/ctrlplane/pilot/copilot/kms"
)

// Rotate makes the version after the highest one. The key has another label
// until it is known to be the only one with that number, so nothing is ever
// wrapped with a key that goes away.
func (h *hsm) Rotate(ctx context.Context, path string) (int, error) {
	select {
	case h.rotating <- struct{}{}:
		defer func() { <-h.rotating }()
	case <-ctx.Done():
		return 0, h.late(ctx, path, "other rotations take too long")
	}
	for try := range 10 {
		select {
		case <-time.After(mathrand.N(time.Duration(1+try*100) * time.Millisecond)):
		case <-ctx.Done():
			return 0, h.late(ctx, path, "other brokers rotate it all the time")
		}
		if version, err := h.rotate(ctx, path); err != nil || version > 0 {
			return version, err
		}
	}
	return 0, fmt.Errorf("key %q in %s: %w: other brokers rotate it all the time", path, h.settings, kms.ErrUnavailable)
}

// pendingMark is in the labels of keys that are not in use yet, between the path
// and what is random.
const pendingMark = " pending "

// rotate makes a version, or 0 if another broker was about to make the same.
func (h *hsm) rotate(ctx context.Context, path string) (int, error) {
	label := path + pendingMark + rand.Text()
	made, err := h.call(ctx, path, message{kind: requestGenerate, fields: [][]byte{[]byte(path), []byte(label)}})
	if err != nil {
		return 0, err
	}
	// A module may know only of the keys that were there when it was
	// initialized, and of its own.
	h.replace()
	a, err := h.call(ctx, path, message{kind: requestConfirm, version: made.version, fields: [][]byte{[]byte(path), []byte(label)}})
	if err != nil {
		return 0, fmt.Errorf("version %d was made, but is not in use: %w", made.version, err)
	}
	return a.version, nil
}

// generateNext makes the version after the highest one, not in use yet, and returns
// it.
func (s *session) generateNext(path, label string) (int, error) {
	if _, err := s.keys(path); err != nil {
		return 0, err
	}
	all, err := s.rotated(path)
	if err != nil {
		return 0, err
	}
	version := all[len(all)-1].version + 1
	return version, s.generate(label, version)
}

// confirm puts the version with a label into use and returns it, or destroys it and
// returns 0 if another broker made that version, too.
func (s *session) confirm(path, label string, version int) (int, error) {
	all, err := s.rotated(path)
	if err != nil {
		return 0, err
	}
	all = slices.DeleteFunc(all, func(k key) bool { return k.version != version })
	if len(all) == 1 && all[0].label == label {
		if err = s.rename(all[0], path); err == nil {
			return version, nil
		}
	}
	for _, k := range all {
		if k.label == label {
			err = errors.Join(err, s.destroy(k))
		}
	}
	return 0, err
}

// rotated returns the versions of a key and those that may become some, in
// order.
func (s *session) rotated(path string) ([]key, error) {
	keys, _, err := s.find()
	keys = slices.DeleteFunc(keys, func(k key) bool { return k.label != path && !strings.HasPrefix(k.label, path+pendingMark) })
	if err == nil && len(keys) == 0 {
		err = &lostError{err: kms.ErrNotFound, old: true}
	}
	return keys, err
}

// generate makes a key.
func (s *session) generate(label string, version int) error {
	return s.readWrite(func(rw pkcs11.SessionHandle) error {
		_, err := s.GenerateKey(rw, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
			pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
			pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32),
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
			pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
			pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
			pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
			pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, true),
			pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true),
			pkcs11.NewAttribute(pkcs11.CKA_WRAP, false), // or another key could be wrapped with it, and decrypted
			pkcs11.NewAttribute(pkcs11.CKA_UNWRAP, false),
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
			pkcs11.NewAttribute(pkcs11.CKA_ID, formatVersion(version)),
		})
		return callError("make a key", err)
	})
}

func (s *session) rename(k key, label string) error {
	return s.readWrite(func(rw pkcs11.SessionHandle) error {
		err := s.SetAttributeValue(rw, k.handle, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, label)})
		return callError("change the new key's label", err)
	})
}

func (s *session) destroy(k key) error {
	return s.readWrite(func(rw pkcs11.SessionHandle) error {
		return callError(fmt.Sprintf("destroy the key %q", k.label), s.DestroyObject(rw, k.handle))
	})
}
