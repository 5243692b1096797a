// Command hsmkey makes an AES key of 32 bytes in a token, as an HSM's tools do, with
// a CKA_ID of one byte.
//
//	hsmkey MODULE PARAMETERS TOKEN PIN LABEL ID
package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"unsafe"

	"github.com/miekg/pkcs11"
)

func main() {
	if err := run(os.Args[1], os.Args[2], os.Args[3], os.Args[4], os.Args[5], os.Args[6]); err != nil {
		fmt.Fprintln(os.Stderr, "hsmkey:", err)
		os.Exit(1)
	}
}

func run(module, parameters, token, pin, label, id string) error {
	version, err := strconv.ParseUint(id, 10, 8)
	if err != nil {
		return err
	}
	p := pkcs11.New(module)
	if p == nil {
		return errors.New("the module can't be loaded")
	}
	var options []pkcs11.InitializeOption
	if parameters != "" {
		options = append(options, pkcs11.InitializeWithReserved(unsafe.Pointer(unsafe.StringData(parameters+"\x00"))))
	}
	if err := p.Initialize(options...); err != nil {
		return err
	}
	defer p.Finalize()
	slots, err := p.GetSlotList(true)
	if err != nil {
		return err
	}
	for _, slot := range slots {
		info, err := p.GetTokenInfo(slot)
		if err != nil || info.Label != token {
			continue
		}
		s, err := p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		if err != nil {
			return err
		}
		if err := p.Login(s, pkcs11.CKU_USER, pin); err != nil {
			return err
		}
		_, err = p.GenerateKey(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
			pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
			pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32),
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
			pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
			pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, true),
			pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true),
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
			pkcs11.NewAttribute(pkcs11.CKA_ID, []byte{byte(version)}),
		})
		return err
	}
	return fmt.Errorf("no token %q", token)
}
