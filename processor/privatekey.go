package processor

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/pbkdf2"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"hash"
)

// Errors of [NormalizePrivateKey].
var (
	ErrKeyPassword = errors.New("the private key has a password")
	errKeyDamaged  = errors.New("the password is wrong, or the private key is damaged")
)

// NormalizePrivateKey returns a private key in a form that ocicrypt reads,
// unencrypted PKCS #8 in PEM, if b contains one in a form that it does not read:
//   - an EC key in SEC 1 form (RFC 5915) in PEM, as "openssl ecparam -genkey"
//     writes it, also with the encryption of RFC 1421;
//   - PKCS #8 encrypted with PBES2 (RFC 8018), in PEM or DER, as "openssl genpkey
//     -aes256" writes it.
//
// It returns nil for everything else, which is ocicrypt's to read. A nil password
// means none was given. Errors contain nothing of b. The caller must clear the
// key.
func NormalizePrivateKey(b, password []byte) (key []byte, err error) {
	block := privateKeyBlock(b)
	if block == nil {
		return nil, nil
	}
	var der []byte
	switch block.Type {
	case "EC PRIVATE KEY":
		der, err = fromSEC1(block, password)
	case "ENCRYPTED PRIVATE KEY":
		der, err = fromEncrypted(block.Bytes, password)
	default:
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer clear(der)
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// NeedsNormalizing reports whether b is for [NormalizePrivateKey].
func NeedsNormalizing(b []byte) bool {
	block := privateKeyBlock(b)
	return block != nil && (block.Type == "EC PRIVATE KEY" || block.Type == "ENCRYPTED PRIVATE KEY")
}

// privateKeyBlock returns the first PEM block, except for the parameters of the
// curve that OpenSSL writes before an EC key. For an encrypted key in DER it
// returns the block that the key would have in PEM.
func privateKeyBlock(b []byte) *pem.Block {
	block, rest := pem.Decode(b)
	if block != nil && block.Type == "EC PARAMETERS" {
		block, _ = pem.Decode(rest)
	}
	if len(b) > 0 && b[0] == derSequence {
		if rest, err := asn1.Unmarshal(b, new(encryptedPrivateKeyInfo)); err == nil && len(rest) == 0 {
			return &pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: b}
		}
	}
	return block
}

func fromSEC1(block *pem.Block, password []byte) ([]byte, error) {
	der := block.Bytes
	//lint:ignore SA1019 OpenSSL still writes such files
	encrypted := x509.IsEncryptedPEMBlock(block)
	if encrypted {
		if password == nil {
			return nil, ErrKeyPassword
		}
		var err error
		//lint:ignore SA1019 OpenSSL still writes such files
		if der, err = x509.DecryptPEMBlock(block, password); err != nil {
			return nil, errKeyDamaged
		}
		defer clear(der)
	}
	key, err := x509.ParseECPrivateKey(der)
	if err != nil && encrypted { // one wrong password in 256 leaves a valid padding
		return nil, errKeyDamaged
	}
	if err != nil {
		return nil, fmt.Errorf("EC private key: %w", err)
	}
	if err := checkCurve(key); err != nil {
		return nil, err
	}
	return x509.MarshalPKCS8PrivateKey(key)
}

// checkCurve refuses keys on curves that JWE has no name for (RFC 7518, section
// 6.2.1.1).
func checkCurve(key *ecdsa.PrivateKey) error {
	switch key.Curve {
	case elliptic.P256(), elliptic.P384(), elliptic.P521():
		return nil
	}
	return fmt.Errorf("EC private key on %s: JWE has only P-256, P-384 and P-521", key.Curve.Params().Name)
}

// maxIterations bounds how long a file can keep a CPU busy: some seconds.
const maxIterations = 10_000_000

var (
	oidPBES2      = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 13}
	oidPBKDF2     = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 12}
	hashesOfHMACs = map[string]func() hash.Hash{
		"1.2.840.113549.2.7":  sha1.New,
		"1.2.840.113549.2.9":  sha256.New,
		"1.2.840.113549.2.10": sha512.New384,
		"1.2.840.113549.2.11": sha512.New,
	}
	keySizesOfCBC = map[string]int{
		"2.16.840.1.101.3.4.1.2":  16,
		"2.16.840.1.101.3.4.1.22": 24,
		"2.16.840.1.101.3.4.1.42": 32,
	}
)

// encryptedPrivateKeyInfo is EncryptedPrivateKeyInfo of RFC 5958.
type encryptedPrivateKeyInfo struct {
	Algorithm pkix.AlgorithmIdentifier
	Data      []byte
}

// fromEncrypted decrypts an EncryptedPrivateKeyInfo.
func fromEncrypted(der, password []byte) ([]byte, error) {
	var in encryptedPrivateKeyInfo
	var scheme struct{ KDF, Cipher pkix.AlgorithmIdentifier }
	var kdf struct {
		Salt       []byte
		Iterations int
		KeySize    int                      `asn1:"optional"`
		PRF        pkix.AlgorithmIdentifier `asn1:"optional"`
	}
	var iv []byte
	if rest, err := asn1.Unmarshal(der, &in); err != nil || len(rest) > 0 {
		return nil, errKeyDamaged
	}
	unknown := errors.New("encrypted private key: only PBES2 with PBKDF2 and AES-CBC is supported: convert it (openssl pkcs8 -topk8 -v2 aes-256-cbc -in FILE -out FILE.new)")
	if !in.Algorithm.Algorithm.Equal(oidPBES2) {
		return nil, unknown
	}
	if _, err := asn1.Unmarshal(in.Algorithm.Parameters.FullBytes, &scheme); err != nil {
		return nil, errKeyDamaged
	}
	size, ok := keySizesOfCBC[scheme.Cipher.Algorithm.String()]
	if !ok || !scheme.KDF.Algorithm.Equal(oidPBKDF2) {
		return nil, unknown
	}
	_, err := asn1.Unmarshal(scheme.KDF.Parameters.FullBytes, &kdf)
	_, err2 := asn1.Unmarshal(scheme.Cipher.Parameters.FullBytes, &iv)
	if err != nil || err2 != nil || len(iv) != aes.BlockSize || len(in.Data) == 0 || len(in.Data)%aes.BlockSize != 0 || kdf.Iterations < 1 || kdf.Iterations > maxIterations {
		return nil, errKeyDamaged
	}
	newHash := sha1.New // the default
	if kdf.PRF.Algorithm != nil {
		if newHash, ok = hashesOfHMACs[kdf.PRF.Algorithm.String()]; !ok {
			return nil, unknown
		}
	}
	if password == nil {
		return nil, ErrKeyPassword
	}
	kek, err := pbkdf2.Key(newHash, string(password), kdf.Salt, kdf.Iterations, size)
	if err != nil {
		return nil, err
	}
	defer clear(kek)
	block, err := aes.NewCipher(kek)
	if err != nil {
		return nil, err
	}
	plain := make([]byte, len(in.Data))
	cipher.NewCBCDecrypter(block, iv).CryptBlocks(plain, in.Data)
	n := int(plain[len(plain)-1])
	if n < 1 || n > aes.BlockSize {
		clear(plain)
		return nil, errKeyDamaged
	}
	plain = plain[:len(plain)-n]
	if _, err := x509.ParsePKCS8PrivateKey(plain); err != nil {
		clear(plain)
		return nil, errKeyDamaged
	}
	return plain, nil
}
