//go:build linux && !no_tpm

// Package tpm seals keys to this machine's TPM 2.0, which opens them nowhere else. The
// build tag no_tpm leaves it out.
package tpm

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/internal/fips"
)

// Types returns the types of backends that this package has.
func Types() kms.Types { return kms.Types{"tpm": open} }

// backend seals under the TPM's storage root key. A path is any name: what was sealed for
// one path is not opened for another. The TPM has no versions, so 1 stands for all.
//
// Wrapped is the JSON of [sealed]. The TPM seals the plaintext, with the SHA-256 of the
// path after it.
type backend struct {
	device string
	pcrs   *pcrs         // nil: no policy
	turn   chan struct{} // holds one while a call uses the TPM
}

type settings struct {
	// Device is a device, or a unix socket as swtpm has. The default has a resource
	// manager in front: the TPM itself has room for three objects.
	Device string `toml:"device"`
	PCRs   string `toml:"pcrs"` // as in "sha256:0,7"; default: no policy
}

const defaultDevice = "/dev/tpmrm0"

// sealed is a sealed object, as the TPM loads it.
type sealed struct {
	Parent  []byte `json:"parent"` // the name of the storage root key
	Public  []byte `json:"public"`
	Private []byte `json:"private"`
	PCRs    string `json:"pcrs,omitempty"`
}

// maxSealed is how long sealed may be, in bytes.
const maxSealed = 4096

func open(decode kms.Settings) (kms.Backend, error) {
	s := settings{Device: defaultDevice}
	if err := decode(&s); err != nil {
		return nil, err
	}
	err := fips.Refuse("the sessions of a TPM are encrypted with AES-CFB, by Go's library for TPMs",
		"use another KMS, or a file for the master key")
	if err != nil {
		return nil, err
	}
	b := &backend{device: s.Device, turn: make(chan struct{}, 1)}
	if !filepath.IsAbs(s.Device) {
		return nil, fmt.Errorf("device = %q: give the absolute path of a TPM 2.0, as in %s", s.Device, defaultDevice)
	}
	if s.PCRs != "" {
		var err error
		if b.pcrs, err = parsePCRs(s.PCRs); err != nil {
			return nil, err
		}
	}
	return b, nil
}

func (b *backend) Close() error { return nil }

// Unlimited implements [kms.Unlimited]. The TPM encrypts each object with a key of its own.
func (b *backend) Unlimited() {}

func (b *backend) Wrap(ctx context.Context, path string, plaintext []byte) (int, []byte, error) {
	if err := kms.CheckPlaintext(plaintext); err != nil {
		return 0, nil, err
	}
	content := slices.Concat(plaintext, boundTo(path))
	wrapped, err := b.call(ctx, func(t transport.TPM) ([]byte, error) {
		defer clear(content)
		return b.seal(t, content)
	})
	return 1, wrapped, err
}

func (b *backend) Unwrap(ctx context.Context, path string, version int, wrapped []byte) ([]byte, error) {
	if err := kms.CheckOnlyVersion(version); err != nil {
		return nil, err
	}
	var s sealed
	if len(wrapped) > maxSealed || json.Unmarshal(wrapped, &s) != nil || len(s.Public) == 0 || len(s.Private) == 0 {
		return nil, fmt.Errorf("%w: it is not what a TPM sealed", kms.ErrUnwrap)
	}
	if s.PCRs != b.pcrs.String() {
		return nil, fmt.Errorf("the TPM %s: %w: it was sealed with pcrs = %q, and the configuration has pcrs = %q: use a backend of that setting to open it", b.device, kms.ErrForbidden, s.PCRs, b.pcrs)
	}
	content, err := b.call(ctx, func(t transport.TPM) ([]byte, error) { return b.unseal(t, s) })
	if err != nil {
		return nil, err
	}
	plaintext, ok := bytes.CutSuffix(content, boundTo(path))
	if !ok || len(plaintext) == 0 {
		clear(content)
		return nil, fmt.Errorf("the TPM %s: %w: it was sealed for another path", b.device, kms.ErrUnwrap)
	}
	return plaintext, nil
}

func boundTo(path string) []byte {
	sum := sha256.Sum256([]byte(path))
	return sum[:]
}

// call calls do with the TPM, one at a time. A call that takes longer than ctx is left to
// itself: nothing can stop it.
func (b *backend) call(ctx context.Context, do func(transport.TPM) ([]byte, error)) ([]byte, error) {
	late := func() error {
		return fmt.Errorf("the TPM %s: %w: it takes too long: %w", b.device, kms.ErrUnavailable, context.Cause(ctx))
	}
	if ctx.Err() != nil {
		return nil, late()
	}
	select {
	case b.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, late()
	}
	type result struct {
		b   []byte
		err error
	}
	done := make(chan result, 1)
	go func() {
		defer func() { <-b.turn }()
		t, err := b.connect()
		if err != nil {
			done <- result{nil, err}
			return
		}
		defer t.Close()
		out, err := do(t)
		done <- result{out, b.explain(err)}
	}()
	select {
	case r := <-done:
		return r.b, r.err
	case <-ctx.Done():
		return nil, late()
	}
}

func (b *backend) connect() (transport.TPMCloser, error) {
	info, err := os.Stat(b.device)
	var t transport.TPMCloser
	switch {
	case err != nil:
	case info.Mode().Type() == fs.ModeSocket:
		t, err = linuxudstpm.Open(b.device)
	default:
		t, err = linuxtpm.Open(b.device)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("the TPM %s: %w: there is none, or copilot does not see it (PrivateDevices= of its unit): %w", b.device, kms.ErrUnavailable, err)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("the TPM %s: %w: add copilot's user to the group of the device (tss): %w", b.device, kms.ErrForbidden, err)
	case err != nil:
		return nil, fmt.Errorf("the TPM %s: %w: %w", b.device, kms.ErrUnavailable, err)
	}
	return t, nil
}

var (
	errOtherTPM = fmt.Errorf("%w: another TPM sealed it, or this one was cleared since", kms.ErrUnwrap)
	errPolicy   = fmt.Errorf("%w: the PCRs are not as they were when it was sealed, as after an update of firmware or boot loader", kms.ErrForbidden)
)

// explain says what an error of the TPM means to our caller.
func (b *backend) explain(err error) error {
	kind := kms.ErrUnavailable
	switch is := func(target error) bool { return errors.Is(err, target) }; {
	case err == nil:
		return nil
	case is(kms.ErrUnwrap), is(kms.ErrForbidden), is(kms.ErrUnavailable):
		return fmt.Errorf("the TPM %s: %w", b.device, err)
	case is(tpm2.TPMRCPolicyFail), is(tpm2.TPMRCPCRChanged):
		kind = errPolicy
	case is(tpm2.TPMRCIntegrity), is(tpm2.TPMRCSize), is(tpm2.TPMRCValue):
		kind = kms.ErrUnwrap
	case is(tpm2.TPMRCLockout), is(tpm2.TPMRCAuthFail), is(tpm2.TPMRCBadAuth):
		kind = kms.ErrForbidden
	}
	return fmt.Errorf("the TPM %s: %w: %w", b.device, kind, err)
}

// parent is the storage root key.
type parent struct {
	tpm2.NamedHandle
	public tpm2.TPMTPublic
	flush  func()
}

// persistentSRK is where the storage root key of a provisioned TPM is (TCG TPM v2.0
// Provisioning Guidance, section 7.8).
const persistentSRK tpm2.TPMHandle = 0x81000001

// openParent returns the storage root key with a name, or any if name is nil. The TPM
// derives the ECC one again each time, which needs no change of it. With an owner password
// it does not, and then the persistent one is used.
func openParent(t transport.TPM, name []byte) (parent, error) {
	fits := func(n tpm2.TPM2BName) bool { return name == nil || bytes.Equal(n.Buffer, name) }
	made, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(t)
	if err == nil {
		flush := func() { tpm2.FlushContext{FlushHandle: made.ObjectHandle}.Execute(t) }
		if p, ok := parentOf(made.ObjectHandle, made.OutPublic, flush); ok && fits(p.Name) {
			return p, nil
		}
		flush()
	}
	if kept, errKept := (tpm2.ReadPublic{ObjectHandle: persistentSRK}.Execute(t)); errKept == nil {
		if p, ok := parentOf(persistentSRK, kept.OutPublic, func() {}); ok && fits(p.Name) {
			return p, nil
		}
	}
	if errors.Is(err, tpm2.TPMRCBadAuth) || errors.Is(err, tpm2.TPMRCAuthFail) {
		return parent{}, fmt.Errorf("%w: its owner has a password, and there is no storage root key at %#x, or another one than it was sealed under: %w", kms.ErrForbidden, persistentSRK, err)
	}
	return parent{}, cmp.Or(err, errOtherTPM)
}

// parentOf returns a storage root key with the name that its public part has. The TPM says
// its name too, and somebody on the wires can say another.
func parentOf(handle tpm2.TPMHandle, public tpm2.TPM2BPublic, flush func()) (parent, bool) {
	content, err := public.Contents()
	if err != nil {
		return parent{}, false
	}
	name, err := tpm2.ObjectName(content)
	if err != nil {
		return parent{}, false
	}
	return parent{tpm2.NamedHandle{Handle: handle, Name: *name}, *content, flush}, true
}

// session returns a session whose parameters are encrypted to the storage root key, since
// the wires of a TPM can be listened to.
func (p parent) session(direction tpm2.AuthOption) []tpm2.AuthOption {
	return []tpm2.AuthOption{direction, tpm2.Salted(p.Handle, p.public)}
}

const nonceSize = 16 // bytes, of sessions

func (b *backend) seal(t transport.TPM, content []byte) ([]byte, error) {
	p, err := openParent(t, nil)
	if err != nil {
		return nil, err
	}
	defer p.flush()
	template := tpm2.TPMTPublic{
		Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true, UserWithAuth: b.pcrs == nil},
	}
	if b.pcrs != nil {
		if template.AuthPolicy.Buffer, err = b.pcrs.policy(t); err != nil {
			return nil, err
		}
	}
	made, err := tpm2.Create{
		ParentHandle: tpm2.AuthHandle{Handle: p.Handle, Name: p.Name,
			Auth: tpm2.HMAC(tpm2.TPMAlgSHA256, nonceSize, p.session(tpm2.AESEncryption(128, tpm2.EncryptIn))...)},
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
			Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: content}),
		}},
		InPublic: tpm2.New2B(template),
	}.Execute(t)
	if err != nil {
		return nil, err
	}
	return json.Marshal(sealed{Parent: p.Name.Buffer, Public: made.OutPublic.Bytes(), Private: made.OutPrivate.Buffer, PCRs: b.pcrs.String()})
}

func (b *backend) unseal(t transport.TPM, s sealed) ([]byte, error) {
	p, err := openParent(t, s.Parent)
	if err != nil {
		return nil, err
	}
	defer p.flush()
	loaded, err := tpm2.Load{
		ParentHandle: tpm2.AuthHandle{Handle: p.Handle, Name: p.Name, Auth: tpm2.PasswordAuth(nil)},
		InPrivate:    tpm2.TPM2BPrivate{Buffer: s.Private},
		InPublic:     tpm2.BytesAs2B[tpm2.TPMTPublic](s.Public),
	}.Execute(t)
	if err != nil {
		return nil, err
	}
	defer tpm2.FlushContext{FlushHandle: loaded.ObjectHandle}.Execute(t)
	options := p.session(tpm2.AESEncryption(128, tpm2.EncryptOut))
	auth := tpm2.HMAC(tpm2.TPMAlgSHA256, nonceSize, options...)
	if b.pcrs != nil {
		auth = tpm2.Policy(tpm2.TPMAlgSHA256, nonceSize, b.pcrs.satisfy, options...)
	}
	out, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: loaded.ObjectHandle, Name: loaded.Name, Auth: auth}}.Execute(t)
	if err != nil {
		return nil, err
	}
	return out.OutData.Buffer, nil
}
