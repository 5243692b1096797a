package brokerconfig

import (
	"cmp"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/errline"
	"github.com/ctrlplane/pilot/internal/publickek"
	"github.com/ctrlplane/pilot/internal/regular"
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
// nil if none has, and there is a broker to ask. Of several it is that of the newest version.
// The files are read each time, so a new one counts at once. One that can't be read is an
// error for a KEK that it may be for.
func (s *Settings) PublicKey(id string) (*publickek.PublicKey, error) {
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
			if len(s.Broker) == 0 || mayBeFor(name, id) {
				bad = append(bad, err)
			}
		case f.KEK == id && f.Replaces(newest):
			newest, in = f, name
		}
	}
	if newest == nil {
		if len(bad) > 0 {
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

// mayBeFor reports whether a file that can't be read as a public key may be that of a KEK,
// by its name or its text.
func mayBeFor(file, id string) bool {
	if strings.TrimSuffix(filepath.Base(file), publicSuffix) == id {
		return true
	}
	b, err := regular.ReadText(file, publickek.MaxFile)
	return err == nil && publickek.Names(b, id)
}

// PublicKeyFile is what is known of a file of public-keys.
type PublicKeyFile struct {
	Path string
	// KEK is the KEK that the file is for, and Expires when it can't be used any more, if
	// the file can be read.
	KEK     string
	Expires time.Time
	// Err says why it can't be used now. May be nil.
	Err error
}

// PublicKeyFiles reads and verifies the files of public-keys that are used: of several for
// one KEK that of the newest version, and those that can't be read.
func (s *Settings) PublicKeyFiles() ([]PublicKeyFile, error) {
	names, err := s.publicKeyFiles()
	if err != nil || len(names) == 0 {
		return nil, err
	}
	roots, err := s.PublicKeysRoots()
	if err != nil {
		return nil, err
	}
	var all []PublicKeyFile
	newest := map[string]*publickek.File{}
	in := map[string]string{}
	for _, name := range names {
		f, err := publickek.ReadFile(name)
		switch {
		case err != nil:
			all = append(all, PublicKeyFile{Path: name, Err: err})
		case f.Replaces(newest[f.KEK]):
			newest[f.KEK], in[f.KEK] = f, name
		}
	}
	for _, kek := range slices.Sorted(maps.Keys(newest)) {
		f := newest[kek]
		_, err := f.Verify(roots, time.Now())
		all = append(all, PublicKeyFile{in[kek], kek, f.End(), err})
	}
	return all, nil
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
