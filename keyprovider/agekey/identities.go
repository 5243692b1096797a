package agekey

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"

	"filippo.io/age"
	"filippo.io/age/armor"
	"filippo.io/age/plugin"

	"github.com/ctrlplane/pilot/internal/errline"
	"github.com/ctrlplane/pilot/internal/regular"
)

// ErrNotUnwrapped is the error of a layer key that no identity unwraps.
var ErrNotUnwrapped = errors.New("no identity in age-identities unwraps it")

// Identities are those in some files.
type Identities struct {
	native []age.Identity
	plugin map[string][]string // identities in their encoding, by the name of their plugin
	bad    error               // of files that can't be used
}

// Read reads files of identities as age-keygen and age's plugins write them. Files that
// can't be used do no harm to the others: errors of [Identities.Unwrap] name them.
func Read(files []string) *Identities {
	ids, err := newIdentities()
	if err != nil {
		ids.bad = err
		return ids
	}
	var errs []error
	for _, name := range files {
		if err := ids.read(name); err != nil {
			errs = append(errs, fmt.Errorf("age-identities: %w", err))
		}
	}
	if len(errs) > 0 {
		ids.bad = errline.Join(errs...)
	}
	return ids
}

// newIdentities returns none yet, and an error where they must not be read at all.
func newIdentities() (*Identities, error) {
	return &Identities{plugin: make(map[string][]string)}, refuse()
}

// CheckIdentities reads a file of identities. err says why it can't be used. exposed says that
// users other than its owner may read private keys in it. Identities of plugins are none: they
// say where the key is.
func CheckIdentities(name string) (exposed, err error) {
	ids, err := newIdentities()
	if err != nil {
		return nil, err
	}
	if err := ids.read(name); err != nil {
		return nil, err
	}
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if mode := info.Mode().Perm(); len(ids.native) > 0 && mode&0o077 != 0 && runtime.GOOS != "windows" {
		exposed = fmt.Errorf("other users may read the private keys in %s (mode %04o): chmod 0600 it, and if they have, replace them", name, mode)
	}
	return exposed, nil
}

func (ids *Identities) read(name string) error {
	b, err := regular.ReadText(name, regular.MaxConfig)
	if err != nil {
		return err
	}
	defer clear(b)
	if text := bytes.TrimSpace(b); bytes.HasPrefix(text, []byte("age-encryption.org/")) || bytes.HasPrefix(text, []byte(armor.Header)) {
		return fmt.Errorf("%s is encrypted, and nobody is there to type its passphrase: decrypt it into a file that only this user can read", name)
	}
	n, found := 0, 0
	for text := range bytes.Lines(b) {
		n++
		line := string(bytes.TrimSpace(text))
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if err := ids.add(line); err != nil {
			return fmt.Errorf("%s:%d: %w", name, n, err)
		}
		found++
	}
	if found == 0 {
		return fmt.Errorf("%s has no identity", name)
	}
	return nil
}

// add adds the identity of a line. Errors quote nothing of it.
func (ids *Identities) add(line string) error {
	var id age.Identity
	var err error
	switch {
	case strings.HasPrefix(line, "AGE-PLUGIN-"):
		name, _, err := plugin.ParseIdentity(line)
		if err != nil {
			break
		}
		ids.plugin[name] = append(ids.plugin[name], line)
		return nil
	case strings.HasPrefix(line, "AGE-SECRET-KEY-PQ-1"):
		id, err = age.ParseHybridIdentity(line)
	case strings.HasPrefix(line, "AGE-SECRET-KEY-1"):
		id, err = age.ParseX25519Identity(line)
	case strings.HasPrefix(line, "age1"):
		return errors.New("it is a recipient, and an identity begins with AGE-SECRET-KEY- or AGE-PLUGIN-")
	}
	if id == nil || err != nil {
		return errors.New("it is not an identity of age, or is damaged")
	}
	ids.native = append(ids.native, id)
	return nil
}

// Unwrap returns the layer key that was wrapped for a recipient, with the identities that
// are keys. The error wraps [ErrNotUnwrapped] if none fits.
func (ids *Identities) Unwrap(wrapped []byte) ([]byte, error) {
	if len(ids.native) == 0 {
		return nil, ids.notUnwrapped(nil)
	}
	layerKey, err := decrypt(wrapped, ids.native...)
	if err != nil {
		return nil, ids.notUnwrapped(err)
	}
	return layerKey, nil
}

// Plugins returns the names of the plugins that may unwrap what was wrapped for a
// recipient: its own, or all if it is one of those that several plugins share.
func (ids *Identities) Plugins(to string) (names []string) {
	own, _, err := plugin.ParseRecipient(to)
	if err != nil {
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(ids.plugin)) {
		if name == own || own == "tag" || own == "tagpq" {
			names = append(names, name)
		}
	}
	return names
}

// UnwrapByPlugin is [Identities.Unwrap] with the identities of a plugin, which gets 15
// seconds. The error wraps [ErrNoPlugin] if it is not installed.
func (ids *Identities) UnwrapByPlugin(ctx context.Context, name string, wrapped []byte) ([]byte, error) {
	layerKey, err := runPlugin(ctx, name, pluginRequest{Identities: ids.plugin[name], Data: wrapped})
	if err != nil {
		return nil, ids.notUnwrapped(err)
	}
	return layerKey, nil
}

func (ids *Identities) notUnwrapped(err error) error {
	out := ErrNotUnwrapped
	if err != nil && !errors.As(err, new(*age.NoIdentityMatchError)) {
		out = fmt.Errorf("%w: %w", out, err)
	}
	if ids.bad != nil {
		out = fmt.Errorf("%w (%w)", out, ids.bad)
	}
	return out
}
