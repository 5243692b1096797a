package keystore

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/ctrlplane/pilot/internal/regular"
)

const (
	masterFile = "master.key"
	// masterCredential is the name under which systemd hands over the
	// master key (LoadCredential=copilot-master-key:…).
	masterCredential = "copilot-master-key"
	masterSize       = 32 // bytes
)

// masterBytes is what a file has: the master key and, if that is not the first one of its
// store, the audit log's key after it.
type masterBytes []byte

func (b masterBytes) key() []byte { return b[:masterSize] }

// auditKey returns the key of the audit log: 32 bytes.
func (b masterBytes) auditKey() ([]byte, error) {
	if len(b) > masterSize {
		return b[masterSize:], nil
	}
	return deriveAuditKey(b.key())
}

// masterCredentialFile returns the name of the credential, whether it exists or not, or ""
// if there are none.
func masterCredentialFile() string {
	if credentials := os.Getenv("CREDENTIALS_DIRECTORY"); credentials != "" {
		return filepath.Join(credentials, masterCredential)
	}
	return ""
}

// masterFrom returns the master key, and the file that it is in. It makes the file in dir
// if there is none and mayMake says that no KEK is sealed yet.
func masterFrom(dir string, mayMake bool) (masterBytes, string, error) {
	if name := masterCredentialFile(); name != "" {
		// systemd sees to it that only the service reads it; a pod's fsGroup may.
		key, err := readMaster(name, 0o027, "chmod 0440 it, or give a Secret's volume defaultMode: 0440")
		if !errors.Is(err, fs.ErrNotExist) {
			return key, name, err
		}
	}
	name := filepath.Join(dir, masterFile)
	key, err := readMaster(name, 0o077, "chmod 0600 it")
	if !errors.Is(err, fs.ErrNotExist) {
		return key, name, err
	}
	if !mayMake {
		return nil, "", fmt.Errorf("%w: put %s back, or hand it over as the credential %s", errNoMaster, name, masterCredential)
	}
	key, err = makeMaster(name)
	return key, name, err
}

var errNoMaster = errors.New("the master key is missing")

// readMaster reads a master key from a file that has none of the mode bits in
// forbidden, which fix removes.
func readMaster(name string, forbidden fs.FileMode, fix string) (masterBytes, error) {
	f, err := regular.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := checkFile(name, info, forbidden, "read", fix+", and if others could have read it, import the KEKs into a new store"); err != nil {
		return nil, err
	}
	if n := info.Size(); n != masterSize && n != 2*masterSize {
		return nil, fmt.Errorf("%s has %d bytes, not %d: it is no master key", name, n, masterSize)
	}
	key := make([]byte, info.Size())
	if _, err := io.ReadFull(f, key); err != nil {
		return nil, err
	}
	return key, nil
}

// makeMaster makes a master key in a file.
func makeMaster(name string) (masterBytes, error) {
	key := make([]byte, masterSize)
	rand.Read(key) // never fails
	if err := writeMaster(name, key); err != nil {
		clear(key)
		return nil, err
	}
	return key, nil
}

// writeMaster writes a master key that is whole on disk or not there at all.
func writeMaster(name string, key []byte) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(name), masterFile+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails once it is renamed
	_, err = f.Write(key)
	err = errors.Join(err, giveToOwner(f), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err == nil {
		err = syncDir(filepath.Dir(name))
	}
	if err != nil {
		return fmt.Errorf("make %s: %w", name, err)
	}
	return nil
}

func syncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// AuditKey returns the key that authenticates the audit log of the store in
// dir, whose master key is a file: 32 bytes.
func AuditKey(dir string) ([]byte, error) {
	master, _, err := masterFrom(dir, false)
	if err != nil {
		return nil, err
	}
	return master.auditKey()
}
