package publickek

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/internal/regular"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// MaxFile bounds the file of a public key, in bytes.
const MaxFile = 64 << 10

// The types of the PEM blocks in a file, in their order. One or more certificates of the
// type CERTIFICATE follow: that of the signer, and those between it and the CA.
const (
	keyBlock       = "PILOT PUBLIC KEY"
	signatureBlock = "PILOT SIGNATURE"
)

// skew is how far the clocks of the broker and of who encrypts may be apart.
const skew = 5 * time.Minute

// File is what the file of a public key says. It is not verified.
type File struct {
	KEK     string
	Version int
	// Broker is the identity of the broker that signed it.
	Broker           string
	Created, Expires time.Time
	// Key has Size bytes.
	Key []byte

	signed    []byte // the text of the first block
	signature []byte
	certs     []*x509.Certificate
}

// The headers of the first block.
const (
	headerKEK     = "KEK"
	headerVersion = "KEK-Version"
	headerSuite   = "Suite"
	headerBroker  = "Broker"
	headerCreated = "Created"
	headerExpires = "Expires"
)

// encode returns the text of the first block, which is what is signed.
func (f *File) encode() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: keyBlock, Bytes: f.Key, Headers: map[string]string{
		headerKEK:     f.KEK,
		headerVersion: strconv.Itoa(f.Version),
		headerSuite:   wireformat.MethodHPKE,
		headerBroker:  f.Broker,
		headerCreated: f.Created.UTC().Format(time.RFC3339),
		headerExpires: f.Expires.UTC().Format(time.RFC3339),
	}})
}

var (
	errNoFile  = errors.New("it is not the file of a public key, as \"copilot keys public\" prints it")
	errChanged = errors.New("it was changed after it was signed, or is cut off")
)

// Parse reads the file of a public key, without verifying it: see [File.Verify].
func Parse(text []byte) (*File, error) {
	if len(text) > MaxFile {
		return nil, fmt.Errorf("it has more than %d KiB", MaxFile>>10)
	}
	list, err := blocks(text)
	if err != nil {
		return nil, err
	}
	f, err := parseKey(list[0])
	if err != nil {
		return nil, err
	}
	if len(list) == 1 {
		return nil, errors.New("it is not signed")
	}
	if list[1].Type != signatureBlock || len(list) < 3 {
		return nil, errNoFile
	}
	f.signature = list[1].Bytes
	for _, b := range list[2:] {
		cert, err := x509.ParseCertificate(b.Bytes)
		if b.Type != "CERTIFICATE" || err != nil {
			return nil, errNoFile
		}
		f.certs = append(f.certs, cert)
	}
	return f, nil
}

// blocks returns the PEM blocks of a text, at least one. Nothing else may be there: what a
// person reads is what was signed. Mail may have changed the ends of lines.
func blocks(text []byte) (list []*pem.Block, err error) {
	lines := bytes.Split(text, []byte("\n"))
	for i := range lines {
		lines[i] = bytes.TrimRight(lines[i], " \t\r")
	}
	text = append(bytes.TrimSpace(bytes.Join(lines, []byte("\n"))), '\n')
	var again []byte
	for rest := text; ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		list = append(list, b)
		again = append(again, pem.EncodeToMemory(b)...)
	}
	switch {
	case len(list) == 0 || list[0].Type != keyBlock:
		return nil, errNoFile
	case !bytes.Equal(again, text):
		return nil, errChanged
	}
	return list, nil
}

// parseKey reads the first block.
func parseKey(b *pem.Block) (*File, error) {
	if suite := b.Headers[headerSuite]; suite != wireformat.MethodHPKE {
		return nil, fmt.Errorf("it is for the suite %.60q, and this pilot wraps with %s", suite, wireformat.MethodHPKE)
	}
	f := &File{KEK: b.Headers[headerKEK], Broker: b.Headers[headerBroker], Key: b.Bytes}
	if err := wireformat.ValidateKEKID(f.KEK); err != nil {
		return nil, err
	}
	var err, err2, err3 error
	f.Version, err = strconv.Atoi(b.Headers[headerVersion])
	f.Created, err2 = time.Parse(time.RFC3339, b.Headers[headerCreated])
	f.Expires, err3 = time.Parse(time.RFC3339, b.Headers[headerExpires])
	if err := errors.Join(err, err2, err3); err != nil || f.Version < 1 {
		return nil, errNoFile
	}
	// Headers that are not known, and other spellings of these.
	if f.signed = f.encode(); !bytes.Equal(f.signed, pem.EncodeToMemory(b)) {
		return nil, errChanged
	}
	return f, nil
}

// Replaces reports whether the file is to be used in the place of another one of the same
// KEK, which may be nil.
func (f *File) Replaces(other *File) bool {
	return other == nil || other.Version < f.Version || other.Version == f.Version && other.Expires.Before(f.Expires)
}

// End returns when the file, or a certificate in it, expires.
func (f *File) End() time.Time {
	end := f.Expires
	for _, c := range f.certs {
		if c.NotAfter.Before(end) {
			end = c.NotAfter
		}
	}
	return end
}

// Names reports whether a text that can't be read as the file of a public key says that it is
// for a KEK.
func Names(text []byte, kek string) bool {
	for line := range bytes.Lines(text) {
		if string(bytes.TrimSpace(line)) == headerKEK+": "+kek {
			return true
		}
	}
	return false
}

// Verify returns the public key if the file was signed by a broker whose certificate is
// from one of roots, and has not expired at the time now.
func (f *File) Verify(roots *x509.CertPool, now time.Time) (PublicKey, error) {
	if err := f.verifySigner(roots, now); err != nil {
		return PublicKey{}, err
	}
	renew := fmt.Sprintf("get a new one with \"copilot keys public %s\"", f.KEK)
	switch {
	case !now.Before(f.Expires):
		return PublicKey{}, fmt.Errorf("it expired on %s: %s", f.Expires.Format(time.RFC3339), renew)
	case now.Add(skew).Before(f.Created):
		return PublicKey{}, fmt.Errorf("it is from %s, and here it is %s: check the clock", f.Created.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	return newPublicKey(f.Key, f.KEK, f.Version)
}

// Read reads and verifies the file of a public key.
func Read(name string, roots *x509.CertPool) (PublicKey, error) {
	f, err := ReadFile(name)
	if err != nil {
		return PublicKey{}, err
	}
	key, err := f.Verify(roots, time.Now())
	if err != nil {
		return PublicKey{}, fmt.Errorf("public key of KEK %q in %s: %w", f.KEK, name, err)
	}
	return key, nil
}

// ReadFile reads the file of a public key without verifying it.
func ReadFile(name string) (*File, error) {
	b, err := regular.ReadText(name, MaxFile)
	if err != nil {
		return nil, fmt.Errorf("public key: %w", err)
	}
	f, err := Parse(b)
	if err != nil {
		if strings.Contains(string(b), "PRIVATE KEY-----") {
			err = errors.New("it has a private key: this takes what \"copilot keys public\" prints")
		}
		return nil, fmt.Errorf("public key %s: %w", name, err)
	}
	return f, nil
}
