package brokerconfig

import (
	"cmp"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/errline"
	"github.com/ctrlplane/pilot/internal/publickek"
	"github.com/ctrlplane/pilot/internal/setting"
)

// publicSuffix is what the names of public keys in a directory end in.
const publicSuffix = ".pub"

// Paths are names of files, or of directories, separated by commas in text.
type Paths []string

// String returns the text of the names.
func (p *Paths) String() string { return strings.Join(*p, ",") }

// UnmarshalText reads names.
func (p *Paths) UnmarshalText(b []byte) error {
	return setting.Words((*[]string)(p), b, func(name string, _ []string) error {
		if name == "" {
			return errors.New("a name is empty")
		}
		return nil
	})
}

// PublicKey returns the public half of a KEK that one of the files of public-keys has, or
// nil if none has. Of several it is that of the newest version. The files are read each
// time, so a new one counts at once.
func (s *Settings) PublicKey(id string) (*publickek.PublicKey, error) {
	if len(s.PublicKeys) == 0 {
		return nil, nil
	}
	files, err := s.publicKeyFiles()
	if err != nil {
		return nil, err
	}
	var newest *publickek.File
	var in string
	var bad []error
	for _, name := range files {
		f, err := publickek.ReadFile(name)
		switch {
		case err != nil:
			bad = append(bad, err)
		case f.KEK == id && (newest == nil || newest.Version < f.Version || newest.Version == f.Version && newest.Expires.Before(f.Expires)):
			newest, in = f, name
		}
	}
	if newest == nil {
		if len(bad) > 0 {
			// It may be the one.
			return nil, fmt.Errorf("KEK %q: no file of public-keys that can be used is for it: %w", id, errline.Join(bad...))
		}
		return nil, nil
	}
	roots, err := s.PublicKeysRoots()
	if err != nil {
		return nil, err
	}
	key, err := newest.Verify(roots, time.Now())
	if err != nil {
		return nil, fmt.Errorf("public key of KEK %q in %s: %w", id, in, err)
	}
	return &key, nil
}

// publicKeyFiles returns the files of public-keys: of a directory those whose names end in
// .pub.
func (s *Settings) publicKeyFiles() (files []string, err error) {
	for _, name := range s.PublicKeys {
		info, err := os.Stat(name)
		if err != nil {
			return nil, fmt.Errorf("public-keys: %w", err)
		}
		if !info.IsDir() {
			files = append(files, name)
			continue
		}
		entries, err := os.ReadDir(name)
		if err != nil {
			return nil, fmt.Errorf("public-keys: %w", err)
		}
		for _, e := range entries {
			if strings.HasSuffix(e.Name(), publicSuffix) && !strings.HasPrefix(e.Name(), ".") {
				files = append(files, filepath.Join(name, e.Name()))
			}
		}
	}
	return files, nil
}

// PublicKeysRoots returns the CA whose brokers may sign public keys.
func (s *Settings) PublicKeysRoots() (*x509.CertPool, error) {
	file := cmp.Or(s.PublicKeysCA, s.BrokerCA)
	if file == "" {
		return nil, errors.New("public-keys-ca is not set, nor is broker-ca: name the CA of the broker, its ca.pem, so that the public key of somebody else is noticed")
	}
	roots, err := certfile.Pool(file)
	if err != nil {
		return nil, fmt.Errorf("public-keys-ca: %w", err)
	}
	return roots, nil
}
