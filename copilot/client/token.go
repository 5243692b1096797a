package client

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/ctrlplane/pilot/internal/regular"
)

// maxToken bounds a bearer token, in bytes. That of a service account has some
// 1000, of a person in many groups 10000.
const maxToken = 64 << 10

// tokenFile is a file with a bearer token (RFC 6750), which is replaced while
// it is in use, as the kubelet does with a service account's. It is safe for
// concurrent use.
type tokenFile struct {
	name string

	mu       sync.Mutex
	modified time.Time // when the file that value is from was
	value    string
}

// authorization returns the value of the Authorization header. It reads the file again
// if it has changed. Errors do not quote the file.
func (f *tokenFile) authorization() (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	info, err := os.Stat(f.name)
	if err != nil {
		return "", fmt.Errorf("broker-token-file: %w", err)
	}
	if f.value == "" || !info.ModTime().Equal(f.modified) {
		token, err := readToken(f.name)
		if err != nil {
			return "", fmt.Errorf("broker-token-file: %s %w", f.name, err)
		}
		f.modified, f.value = info.ModTime(), token
	}
	return "Bearer " + f.value, nil
}

func readToken(name string) (string, error) {
	file, err := regular.Open(name)
	if err != nil {
		return "", fmt.Errorf("can't be read: %w", err)
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, maxToken+1))
	if err != nil {
		return "", fmt.Errorf("can't be read: %w", err)
	}
	token := strings.TrimSpace(string(b))
	switch {
	case len(b) > maxToken:
		return "", fmt.Errorf("has more than %d bytes: it holds something other than a token", maxToken)
	case token == "":
		return "", errors.New("is empty")
	case strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }):
		return "", errors.New("holds something other than a token")
	}
	return token, nil
}
