package keystore

import (
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
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

// masterKey returns the master key. It makes the file in dir if there is none
// and mayMake says that no KEK is sealed yet.
func masterKey(dir string, mayMake bool) ([]byte, error) {
	if credentials := os.Getenv("CREDENTIALS_DIRECTORY"); credentials != "" {
		// systemd sees to it that only the service reads it; a pod's fsGroup may.
		key, err := readMaster(filepath.Join(credentials, masterCredential), 0o027, "chmod 0440 it, or give a Secret's volume defaultMode: 0440")
		if !errors.Is(err, fs.ErrNotExist) {
			return key, err
		}
	}
	name := filepath.Join(dir, masterFile)
	key, err := readMaster(name, 0o077, "chmod 0600 it")
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	if !mayMake {
		return nil, fmt.Errorf("the master key is missing: put %s back, or hand it over as the credential %s", name, masterCredential)
	}
	return makeMaster(name)
}

// readMaster reads a master key from a file that has none of the mode bits in
// forbidden, which fix removes.
func readMaster(name string, forbidden fs.FileMode, fix string) ([]byte, error) {
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
	if info.Size() != masterSize {
		return nil, fmt.Errorf("%s has %d bytes, not %d: it is no master key", name, info.Size(), masterSize)
	}
	key := make([]byte, masterSize)
	if _, err := io.ReadFull(f, key); err != nil {
		return nil, err
	}
	return key, nil
}

// makeMaster makes a master key in a file.
func makeMaster(name string) ([]byte, error) {
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
	err = errors.Join(err, f.Sync(), f.Close())
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
// dir: 32 bytes, derived from the master key.
func AuditKey(dir string) ([]byte, error) {
	master, err := masterKey(dir, false)
	if err != nil {
		return nil, err
	}
	defer clear(master)
	return hkdf.Key(sha256.New, master, nil, "copilot audit log", sha256.Size)
}
