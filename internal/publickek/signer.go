package publickek

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"time"
)

// A broker signs public keys with a certificate that is for nothing else: it has the
// extended key usage for signing documents (RFC 9336), neither that of a TLS server nor of
// a client, and as its only name the URI spiffe://TRUST-DOMAIN/copilot/public-keys. So
// somebody who has the key of another certificate of the same CA can't sign public keys.

// SignerPath is the path of a signer's SPIFFE ID.
const SignerPath = "/copilot/public-keys"

// SignerUsage is the extended key usage of a signer: id-kp-documentSigning of RFC 9336.
var SignerUsage = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 36}

// SignerID returns the URI in a signer's certificate.
func SignerID(trustDomain string) *url.URL {
	return &url.URL{Scheme: "spiffe", Host: trustDomain, Path: SignerPath}
}

// IsSigner reports whether a certificate is one that public keys are signed with.
func IsSigner(c *x509.Certificate) bool {
	return !c.IsCA && len(c.URIs) == 1 && c.URIs[0].Host != "" && c.URIs[0].String() == SignerID(c.URIs[0].Host).String() &&
		len(c.DNSNames)+len(c.IPAddresses)+len(c.EmailAddresses)+len(c.ExtKeyUsage) == 0 &&
		len(c.UnknownExtKeyUsage) == 1 && c.UnknownExtKeyUsage[0].Equal(SignerUsage)
}

// Signer signs public keys.
type Signer struct {
	// Chain are the certificates, the signer's first, without the CA.
	Chain []*x509.Certificate
	Key   crypto.Signer
}

// ErrValidity is the error of a file that would be valid for longer than its signer.
var ErrValidity = errors.New("it would be valid for longer than the certificate that signs it")

// Sign returns the file of a public key, valid from now on for that time, in whole seconds.
// The error wraps [ErrValidity] if the signer's certificate expires before.
func (s Signer) Sign(key PublicKey, now time.Time, valid time.Duration) (*File, []byte, error) {
	cert := s.Chain[0]
	if !IsSigner(cert) {
		return nil, nil, fmt.Errorf("the certificate %q is not for signing public keys: \"copilot certs public-keys\" issues one", cert.Subject)
	}
	f := &File{
		KEK: key.ID, Version: key.Version, Broker: cert.URIs[0].String(), Key: key.Bytes(), certs: s.Chain,
		Created: now.UTC().Truncate(time.Second), Expires: now.Add(valid).UTC().Truncate(time.Second),
	}
	if f.Expires.After(cert.NotAfter) || !now.Before(cert.NotAfter) {
		return nil, nil, fmt.Errorf("%w, whose end is %s: renew that with \"copilot certs renew\"", ErrValidity, cert.NotAfter.UTC().Format(time.RFC3339))
	}
	f.signed = f.encode()
	algorithm, hash := algorithmOf(cert)
	if algorithm == x509.UnknownSignatureAlgorithm {
		return nil, nil, fmt.Errorf("the certificate %q has a key that can't sign: use ECDSA, Ed25519 or RSA", cert.Subject)
	}
	digest := f.message()
	opts := crypto.SignerOpts(hash)
	if hash != 0 {
		h := hash.New()
		h.Write(digest)
		digest = h.Sum(nil)
	}
	if algorithm == x509.SHA256WithRSAPSS {
		opts = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: hash}
	}
	var err error
	if f.signature, err = s.Key.Sign(rand.Reader, digest, opts); err != nil {
		return nil, nil, fmt.Errorf("sign the public key: %w", err)
	}
	text := slices.Concat(f.signed, pem.EncodeToMemory(&pem.Block{Type: signatureBlock, Bytes: f.signature}))
	for _, c := range s.Chain {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return f, text, nil
}

// message returns what is signed.
func (f *File) message() []byte { return append([]byte("pilot public key of a KEK\n"), f.signed...) }

// algorithmOf returns how a signer's key signs, and the hash, 0 if the message itself is
// signed.
func algorithmOf(c *x509.Certificate) (x509.SignatureAlgorithm, crypto.Hash) {
	switch key := c.PublicKey.(type) {
	case *ecdsa.PublicKey:
		if key.Curve.Params().BitSize > 256 {
			return x509.ECDSAWithSHA384, crypto.SHA384
		}
		return x509.ECDSAWithSHA256, crypto.SHA256
	case *rsa.PublicKey:
		return x509.SHA256WithRSAPSS, crypto.SHA256
	case ed25519.PublicKey:
		return x509.PureEd25519, 0
	}
	return x509.UnknownSignatureAlgorithm, 0
}

// verifySigner verifies the signature and the certificates.
func (f *File) verifySigner(roots *x509.CertPool, now time.Time) error {
	cert := f.certs[0]
	between := x509.NewCertPool()
	for _, c := range f.certs[1:] {
		between.AddCert(c)
	}
	// crypto/x509 knows no name for the usage, so this function compares it.
	chains, err := cert.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	invalid := x509.CertificateInvalidError{}
	switch {
	case errors.As(err, new(x509.UnknownAuthorityError)):
		return fmt.Errorf("it is another broker's: %s signed it, with a certificate of a CA that is not trusted here", f.Broker)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return fmt.Errorf("the certificate that signed it is valid from %s until %s", cert.NotBefore.UTC().Format(time.RFC3339), cert.NotAfter.UTC().Format(time.RFC3339))
	case err != nil:
		return fmt.Errorf("the certificate that signed it: %w", err)
	}
	if !IsSigner(cert) || !slices.ContainsFunc(chains, mayIssueSigners) {
		return fmt.Errorf("the certificate %q that signed it is not for signing public keys", cert.Subject)
	}
	algorithm, _ := algorithmOf(cert)
	if f.Broker != cert.URIs[0].String() || cert.CheckSignature(algorithm, f.message(), f.signature) != nil {
		return errChanged
	}
	return nil
}

// mayIssueSigners reports whether the CAs of a chain may issue certificates for signing
// documents: the CA with which a broker renews its clients' certificates may not.
func mayIssueSigners(chain []*x509.Certificate) bool {
	for _, c := range chain[1:] {
		restricted := len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) > 0
		may := slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny) || slices.ContainsFunc(c.UnknownExtKeyUsage, SignerUsage.Equal)
		if restricted && !may {
			return false
		}
	}
	return true
}
