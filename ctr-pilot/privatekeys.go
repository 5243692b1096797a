package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/imgcrypt/v2/images/encryption/parsehelpers"
	"github.com/containers/ocicrypt/config"

	"github.com/ctrlplane/pilot/internal/regular"
	"github.com/ctrlplane/pilot/processor"
)

// takeKeys removes the private keys from args that imgcrypt does not read, and
// returns them in a form that it does, or nil if there are none.
func takeKeys(args *parsehelpers.EncArgs) (*config.DecryptConfig, error) {
	var rest []string
	var keys, passwords [][]byte
	for _, arg := range args.Key {
		arg, err := rereadable(arg)
		if err != nil {
			return nil, err
		}
		key, err := normalizedKey(arg)
		if err != nil {
			return nil, err
		}
		if key == nil {
			rest = append(rest, arg)
			continue
		}
		keys, passwords = append(keys, key), append(passwords, nil)
	}
	args.Key = rest
	if keys == nil {
		return nil, nil
	}
	cc, err := config.DecryptWithPrivKeys(keys, passwords)
	return cc.DecryptConfig, err
}

// maxPipedKey bounds a key that comes out of a pipe, in bytes.
const maxPipedKey = 1 << 20

// rereadable returns a --key whose file imgcrypt can read again. The content of a pipe,
// as in --key <(vault kv get ...), goes to a file in memory.
func rereadable(arg string) (string, error) {
	if again, ok := pipedKeys[arg]; ok {
		return again, nil
	}
	name, rest, hasRest := strings.Cut(arg, ":")
	info, err := os.Stat(name)
	if err != nil || strings.HasPrefix(arg, "provider:") || info.Mode()&fs.ModeNamedPipe == 0 {
		return arg, nil
	}
	pipe, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer pipe.Close()
	again, err := memoryFile()
	if err != nil {
		return "", fmt.Errorf("%s: %w", name, err)
	}
	b, err := io.ReadAll(io.LimitReader(pipe, maxPipedKey+1))
	defer clear(b)
	if err == nil && len(b) > maxPipedKey {
		err = fmt.Errorf("a key has at most %d bytes", maxPipedKey)
	}
	if err == nil {
		err = os.WriteFile(again, b, 0)
	}
	if err != nil {
		return "", fmt.Errorf("%s: %w", name, err)
	}
	if hasRest {
		again += ":" + rest
	}
	pipedKeys[arg] = again
	return again, nil
}

// pipedKeys are the keys that came from pipes, which can be read only once.
var pipedKeys = map[string]string{}

// normalizedKey returns the key that a --key names if imgcrypt can't read it, else nil.
// Errors of keys that imgcrypt may be able to read are left to imgcrypt.
func normalizedKey(arg string) ([]byte, error) {
	if strings.HasPrefix(arg, "provider:") {
		return nil, nil
	}
	parts := strings.Split(arg, ":")
	if _, err := os.Stat(parts[0]); err != nil {
		return nil, nil
	}
	b, err := regular.Read(parts[0], regular.MaxConfig)
	if err != nil {
		return nil, err
	}
	defer clear(b)
	if err := processor.CheckPrivateKey(b); err != nil {
		return nil, fmt.Errorf("%s: %w", parts[0], err)
	}
	if !processor.NeedsNormalizing(b) {
		return nil, nil
	}
	var password []byte
	if len(parts) == 2 {
		if password, err = keyPassword(parts[1]); err != nil {
			return nil, fmt.Errorf("password of %s: %w", parts[0], err)
		}
		defer clear(password)
	}
	key, err := processor.NormalizePrivateKey(b, password)
	if errors.Is(err, processor.ErrKeyPassword) {
		err = fmt.Errorf("%w: give it as FILE:pass=PASSWORD, FILE:file=FILE or FILE:fd=NUMBER", err)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", parts[0], err)
	}
	return key, nil
}

// keyPassword reads a password as imgcrypt does: PASSWORD, pass=PASSWORD,
// file=FILE or fd=NUMBER.
func keyPassword(arg string) ([]byte, error) {
	if name, ok := strings.CutPrefix(arg, "file="); ok {
		return regular.Read(name, regular.MaxConfig)
	}
	if number, ok := strings.CutPrefix(arg, "fd="); ok {
		fd, err := strconv.Atoi(number)
		if err != nil {
			return nil, fmt.Errorf("fd=%s is not a number", number)
		}
		f := os.NewFile(uintptr(fd), "password")
		if f == nil {
			return nil, fmt.Errorf("fd=%s is not an open file descriptor", number)
		}
		defer f.Close()
		b := make([]byte, 64) // as much as imgcrypt reads
		n, err := f.Read(b)
		return b[:n], err
	}
	return []byte(strings.TrimPrefix(arg, "pass=")), nil
}
