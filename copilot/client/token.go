package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/ctrlplane/pilot/internal/regular"
)

// maxToken bounds a bearer token, in bytes. That of a service account has some
// 1000, of a person in many groups 10000.
const maxToken = 64 << 10

// tokenSource is where the token to show the brokers comes from. It is safe for
// concurrent use.
type tokenSource interface {
	// authorization returns the value of the Authorization header. Errors do not quote
	// the token.
	authorization(ctx context.Context) (string, error)
}

// tokenSource returns where the token comes from, or nil if the brokers get none.
func (c Config) tokenSource() (tokenSource, error) {
	switch {
	case c.TokenFile != "":
		f := &tokenFile{name: c.TokenFile}
		// What a reboot removes from /run may come later.
		later := strings.HasPrefix(c.TokenFile, "/run/")
		if _, err := f.authorization(context.Background()); err != nil && !(later && errors.Is(err, fs.ErrNotExist)) {
			return nil, err
		}
		return f, nil
	case c.TokenVariable != "":
		return variableToken(c.TokenVariable)
	case c.GitHubAudience != "":
		return newGitHubToken(c.GitHubAudience)
	}
	return nil, nil
}

// fixedToken is a token that stays the same, as that of a GitLab job.
type fixedToken string

func (t fixedToken) authorization(context.Context) (string, error) { return "Bearer " + string(t), nil }

// variableToken returns the token in an environment variable.
func variableToken(name string) (tokenSource, error) {
	token, err := checkToken(os.Getenv(name))
	if err != nil {
		return nil, fmt.Errorf("the variable %s, which broker-token-source names, %w: a GitLab job sets it by id_tokens", name, err)
	}
	return fixedToken(token), nil
}

// tokenFile is a file with a bearer token (RFC 6750), which is replaced while
// it is in use, as the kubelet does with a service account's. It is safe for
// concurrent use.
type tokenFile struct {
	name string

	mu       sync.Mutex
	modified time.Time // when the file that value is from was
	value    string
}

// authorization reads the file again if it has changed.
func (f *tokenFile) authorization(context.Context) (string, error) {
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
	return checkToken(string(b))
}

// checkToken returns a token without the space around it.
func checkToken(s string) (string, error) {
	token := strings.TrimSpace(s)
	switch {
	case len(s) > maxToken:
		return "", fmt.Errorf("has more than %d bytes: it holds something other than a token", maxToken)
	case token == "":
		return "", errors.New("is empty")
	case strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }):
		return "", errors.New("holds something other than a token")
	}
	return token, nil
}
