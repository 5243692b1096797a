package bench

import (
	"testing"

	"github.com/ctrlplane/pilot/copilot/kms/kmstest"
	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/miekg/pkcs11"
)

// BenchmarkHSM wraps with a key in SoftHSM: by copilot's backend, with the module in
// a process of its own, and by the pkcs11 package in this process.
func BenchmarkHSM(b *testing.B) {
	k := harness.NewHSMToken(b, "a")
	h := k.Open()
	p, own := k.Session()
	info, err := p.GetSessionInfo(own)
	if err != nil {
		b.Fatal(err)
	}
	s, err := p.OpenSession(info.SlotID, pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		b.Fatal(err)
	}
	direct := func() error {
		if err := p.FindObjectsInit(s, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, "a"), pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
			pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		}); err != nil {
			return err
		}
		keys, _, err := p.FindObjects(s, 64)
		if err != nil {
			return err
		}
		if err := p.FindObjectsFinal(s); err != nil {
			return err
		}
		if _, err := p.GetAttributeValue(s, keys[0], []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, nil), pkcs11.NewAttribute(pkcs11.CKA_ID, nil),
			pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, nil), pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, nil),
		}); err != nil {
			return err
		}
		params := pkcs11.NewGCMParams(make([]byte, 12), []byte("a"), 128)
		defer params.Free()
		if err := p.EncryptInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}, keys[0]); err != nil {
			return err
		}
		_, err = p.Encrypt(s, kmstest.Secret)
		return err
	}
	const wraps = 500 // in a round
	each := func(f func() error) func() float64 {
		return func() float64 {
			return 1000 / float64(wraps) * took(func() {
				for range wraps {
					if err := f(); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
	compare(b, comparison{name: "wrap with a key in SoftHSM", peer: "the module in the same process", unit: "µs"},
		each(func() error {
			_, _, err := h.Wrap(b.Context(), "a", kmstest.Secret)
			return err
		}), each(direct))
}
