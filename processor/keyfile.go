package processor

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"strings"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"github.com/containers/ocicrypt/utils"
)

// ocicrypt's names for the keys of a [config.DecryptConfig].
const (
	paramPrivateKeys  = "privkeys"
	paramPasswords    = "privkeys-passwords" // one for each of paramPrivateKeys
	paramCertificates = "x509s"
	paramPGP          = "gpg-privatekeys"
	paramPKCS11       = "pkcs11-yamls"
	paramPKCS11Config = "pkcs11-config"
)

// Reasons why a file is not used, where more than one check finds them. Each
// says what to do.
const (
	reasonNoKey     = "neither a private key nor a certificate: move it out of the directory"
	reasonPublicKey = "a public key, which decrypts nothing: move it out of the directory"
	reasonPassword  = "a private key with a password, and nothing here can enter one: store it without (openssl pkey -in FILE -out FILE.new)"
	reasonDamaged   = "damaged or only half written: write it again"
)

// classifyKey returns the parameter of ocicrypt under which the content of a
// file decrypts layers, or why it does not. It decides as ocicrypt's
// utils.SortDecryptionKeys does, which ctd-decoder uses, except that it refuses
// what that accepts and then never decrypts with. A reason contains nothing of
// the file. What [NormalizePrivateKey] can convert must be converted before.
func classifyKey(b []byte) (parameter, reason string) {
	block := privateKeyBlock(b)
	text := bytes.TrimSpace(b)
	switch {
	case len(text) == 0:
		return "", "empty"
	// ocicrypt's PKCS#11 key file, in YAML.
	case bytes.Contains(b, []byte("pkcs11")) && utils.IsPkcs11PrivateKey(b):
		if reason := pkcs11Unusable(); reason != "" {
			return "", reason
		}
		return paramPKCS11, ""
	case block != nil, b[0] == derSequence, text[0] == '{':
		return classifyKeyOrCertificate(b, block)
	case bytes.Contains(b, []byte("-----BEGIN PGP ")):
		return "", "armored OpenPGP: store it in binary (gpg --dearmor FILE)"
	case bytes.Contains(b, []byte("-----BEGIN ")):
		return "", reasonDamaged
	case b[0]&openPGPTag != 0:
		return classifyPGP(b)
	}
	return "", reasonNoKey
}

const (
	derSequence = 0x30 // the first byte of a key or certificate in DER
	openPGPTag  = 0x80 // set in the first byte of each OpenPGP packet (RFC 9580, section 4.2)
)

// classifyKeyOrCertificate classifies PEM, of which block is the first, DER
// and JWK.
func classifyKeyOrCertificate(b []byte, block *pem.Block) (parameter, reason string) {
	if key, err := utils.ParsePrivateKey(b, nil, ""); err == nil {
		switch key.(type) {
		case ed25519.PrivateKey, *ecdh.PrivateKey:
			return "", "a private key that is only good for signatures or key agreement (Ed25519, X25519): use RSA or an EC key on a NIST curve"
		}
		return paramPrivateKeys, ""
	}
	if utils.IsCertificate(b) {
		return paramCertificates, ""
	}
	if utils.IsPublicKey(b) {
		return "", reasonPublicKey
	}
	if block == nil {
		return "", "neither a private key without a password nor a certificate: move it out of the directory, or store the key in PEM (PKCS #8)"
	}
	switch kind := block.Type; {
	//lint:ignore SA1019 such files exist
	case kind == "ENCRYPTED PRIVATE KEY", x509.IsEncryptedPEMBlock(block):
		return "", reasonPassword
	case kind == "EC PRIVATE KEY":
		return "", "an EC private key that is damaged, or on another curve than P-256, P-384 and P-521, which are all that JWE has: write it again, or use RSA"
	case kind == "OPENSSH PRIVATE KEY":
		return "", "a private key in OpenSSH's format: convert it (ssh-keygen -p -N '' -m PKCS8 -f FILE)"
	case strings.HasSuffix(kind, "PUBLIC KEY"):
		return "", reasonPublicKey
	case strings.HasSuffix(kind, "PRIVATE KEY"), kind == "CERTIFICATE":
		return "", reasonDamaged
	}
	return "", reasonNoKey
}

// classifyPGP classifies a binary OpenPGP key ring.
func classifyPGP(b []byte) (parameter, reason string) {
	ring, err := openpgp.ReadKeyRing(bytes.NewReader(b))
	if err != nil || len(ring) == 0 {
		return "", reasonNoKey
	}
	reason = reasonPublicKey
	for _, entity := range ring {
		keys := []*packet.PrivateKey{entity.PrivateKey}
		for _, sub := range entity.Subkeys {
			keys = append(keys, sub.PrivateKey)
		}
		for _, key := range keys {
			switch {
			case key == nil || key.Dummy():
			case key.Encrypted:
				reason = "an OpenPGP private key with a password, and nothing here can enter one: export it without"
			default:
				return paramPGP, ""
			}
		}
	}
	return "", reason
}

// pkcs11Unusable returns why this process can't use keys in PKCS#11 modules, or
// nothing if it can.
func pkcs11Unusable() string {
	if !pkcs11Supported {
		return "a PKCS#11 key, and this program is built without PKCS#11: build it with make build PKCS11=1"
	}
	if _, err := pkcs11Config(); err != nil {
		return fmt.Sprintf("a PKCS#11 key, and ocicrypt's configuration of PKCS#11 modules can't be used (%s): set $OCICRYPT_CONFIG to its file, or to internal", err)
	}
	return ""
}

// pkcs11Config returns ocicrypt's configuration of the PKCS#11 modules that
// this process may load.
func pkcs11Config() ([][]byte, error) {
	// ocicrypt returns it with a key, and this names none.
	key := base64.StdEncoding.EncodeToString([]byte("pkcs11: {uri: 'pkcs11:token=none;object=none'}"))
	params, err := utils.SortDecryptionKeys(key)
	return params[paramPKCS11Config], err
}
