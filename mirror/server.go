package mirror

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"net/http"
	"os"
	"syscall"
	"time"

	"github.com/ctrlplane/pilot/internal/regular"
)

// maxConnectionStreams is how many requests one HTTP/2 connection may make at once.
const maxConnectionStreams = 32

// bodyTimeout bounds the wait for the body of a request, which no request has to have.
const bodyTimeout = 5 * time.Second

// Server returns a server of the mirror, for a listener from [Listener]. Its answers have
// deadlines of their own.
func (m *Mirror) Server() *http.Server {
	return &http.Server{
		Handler:           m,
		ConnContext:       OnConnection,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    32 << 10,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxConnectionStreams},
		ErrorLog:          log.New(&warnings{}, "", 0),
	}
}

// minSecret is how long a secret has to be, in bytes.
const minSecret = 20

// Secret returns the secret in a file that belongs to root or to the process's user, and
// that only its owner may read. If there is no such file, it makes one with a random secret.
func Secret(name string) (string, error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	switch {
	case err == nil:
		secret := rand.Text()
		_, err = f.WriteString(secret + "\n")
		if err = errors.Join(err, f.Close()); err != nil {
			return "", errors.Join(err, os.Remove(name))
		}
		return secret, nil
	case !errors.Is(err, fs.ErrExist):
		return "", err
	}
	if f, err = regular.Open(name); err != nil {
		return "", err
	}
	if err := checkAccess(f); err != nil {
		return "", errors.Join(err, f.Close())
	}
	b, err := regular.ReadAll(f, 4<<10)
	if err != nil {
		return "", err
	}
	secret := bytes.TrimSpace(b)
	if len(secret) < minSecret {
		return "", fmt.Errorf("%s holds %d bytes, and a secret needs %d: remove the file, and pilot makes one", name, len(secret), minSecret)
	}
	return string(secret), nil
}

// checkAccess returns an error if other users may have read a secret, or have put it there.
func checkAccess(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return fmt.Errorf("%s has mode %04o, so other users may have read the secret: remove the file, and pilot makes a new one", f.Name(), mode)
	}
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && owner.Uid != 0 && int(owner.Uid) != os.Geteuid() {
		return fmt.Errorf("%s belongs to user %d, who can read the secret: remove the file, and pilot makes a new one", f.Name(), owner.Uid)
	}
	return nil
}
