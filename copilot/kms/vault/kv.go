//go:build !no_vault

package vault

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/ctrlplane/pilot/copilot/kms"
)

type kvSettings struct {
	settings
	// Field of the secret that holds the KEK: "kek" by default.
	Field string `toml:"field"`
	// Encoding of the KEK in it: base64 (the default), hex or raw.
	Encoding string `toml:"encoding"`
}

// keyValue gives out keys that are fields of secrets in a key-value engine,
// version 2, of a Vault. The secret's versions are the KEK's.
//
// A path is that of a secret in the engine, as "team-a", or the one of Vault's
// API, as "secret/data/team-a": what it starts with is taken off if it is the
// engine's mount and "data/".
type keyValue struct {
	*engine
	field, encoding string
}

// rotatingKeyValue may also make new versions.
type rotatingKeyValue struct{ keyValue }

func openKV(decode kms.Settings) (kms.Backend, error) {
	var s kvSettings
	if err := decode(&s); err != nil {
		return nil, err
	}
	kv := keyValue{field: cmp.Or(s.Field, "kek"), encoding: cmp.Or(s.Encoding, "base64")}
	switch kv.encoding {
	case "base64", "hex", "raw":
	default:
		return nil, fmt.Errorf("encoding = %.40q is neither base64 nor hex nor raw", s.Encoding)
	}
	var err error
	if kv.engine, err = openEngine(s.settings, "secret"); err != nil {
		return nil, err
	}
	if kv.encoding == "raw" {
		return kv, nil // JSON strings do not hold random bytes
	}
	return rotatingKeyValue{kv}, nil
}

// kvVersion is a version of a secret.
type kvVersion struct {
	Data struct {
		Data     map[string]json.RawMessage `json:"data"`
		Metadata struct {
			Version   int    `json:"version"`
			Deleted   string `json:"deletion_time"`
			Destroyed bool   `json:"destroyed"`
		} `json:"metadata"`
	} `json:"data"`
}

func (s kvVersion) clear() {
	for _, value := range s.Data.Data {
		clear(value)
	}
}

// Key implements [kms.Giver].
func (kv keyValue) Key(ctx context.Context, path string, version int) ([]byte, int, error) {
	name, err := kv.name(path)
	if err != nil {
		return nil, 0, err
	}
	s, err := kv.read(ctx, name, version)
	defer s.clear()
	if err != nil {
		return nil, 0, err
	}
	key, err := decodeKey(s.Data.Data[kv.field], kv.encoding)
	if err == nil {
		if err = checkSize(key); err != nil {
			clear(key)
		}
	}
	if err != nil {
		return nil, 0, fmt.Errorf("the Vault at %s: %s: version %d: field %q: %w", kv.address, kv.dataPath(name), s.Data.Metadata.Version, kv.field, err)
	}
	return key, s.Data.Metadata.Version, nil
}

// name returns the name of a secret in the engine.
func (kv keyValue) name(path string) (string, error) {
	name := strings.TrimPrefix(path, kv.mount+"/data/")
	if err := checkPath(name); err != nil {
		return "", fmt.Errorf("path %.100q: %w", path, err)
	}
	return name, nil
}

func (kv keyValue) dataPath(name string) string { return kv.mount + "/data/" + name }

// read returns a version of a secret, 0 for the latest, that has the field.
func (kv keyValue) read(ctx context.Context, name string, version int) (s kvVersion, err error) {
	r := request{path: kv.dataPath(name)}
	if version != 0 {
		r.query = url.Values{"version": {strconv.Itoa(version)}}
	}
	err = kv.do(ctx, r, &s)
	meta := s.Data.Metadata
	if refusal, ok := refused(err, http.StatusNotFound); ok {
		switch {
		case meta.Destroyed:
			refusal.hint = fmt.Sprintf("version %d was destroyed", meta.Version)
		case meta.Deleted != "":
			refusal.hint = fmt.Sprintf("version %d was deleted: vault kv undelete -versions=%[1]d -mount=%s %s", meta.Version, kv.mount, name)
		case version != 0:
			refusal.hint = fmt.Sprintf("there is no version %d", version)
		default:
			refusal.hint = fmt.Sprintf("there is no such secret, or %s is no key-value engine of version 2", kv.mount)
		}
	}
	switch {
	case err != nil:
	case meta.Version < 1 || version != 0 && meta.Version != version:
		err = fmt.Errorf("the Vault at %s: %s: %w: it answers with version %d, not %d", kv.address, r.path, kms.ErrUnavailable, meta.Version, version)
	case s.Data.Data[kv.field] == nil:
		err = fmt.Errorf("the Vault at %s: %s: version %d has no field %q: %w", kv.address, r.path, meta.Version, kv.field, kms.ErrNotFound)
	}
	return s, err
}

// text is a JSON string whose bytes can be cleared.
type text []byte

func (t *text) UnmarshalText(b []byte) error {
	*t = bytes.Clone(b)
	return nil
}

// decodeKey returns a key. Errors do not quote any of it.
func decodeKey(value json.RawMessage, encoding string) ([]byte, error) {
	var s text
	if json.Unmarshal(value, &s) != nil {
		return nil, fmt.Errorf("%w: it is no string", kms.ErrUnavailable)
	}
	if encoding == "raw" {
		return s, nil
	}
	defer clear(s)
	var key []byte
	var err error
	trimmed := bytes.TrimSpace(s) // as of a file or a pipe
	if encoding == "hex" {
		key, err = hex.AppendDecode(nil, trimmed)
	} else {
		key, err = base64.StdEncoding.AppendDecode(nil, trimmed)
	}
	if err != nil {
		clear(key)
		return nil, fmt.Errorf("%w: it is not encoded as %s: set encoding to what it is", kms.ErrUnavailable, encoding)
	}
	return key, nil
}

// Rotate implements [kms.Rotator]. It changes nothing but the field, and writes
// only over the version that it read, so that of concurrent calls each
// makes a version of its own.
func (kv rotatingKeyValue) Rotate(ctx context.Context, path string) (int, error) {
	name, err := kv.name(path)
	if err != nil {
		return 0, err
	}
	for range 10 {
		var version int
		version, err = kv.rotate(ctx, name)
		if _, again := refused(err, http.StatusBadRequest, "check-and-set"); !again {
			return version, err
		}
	}
	return 0, err
}

func (kv rotatingKeyValue) rotate(ctx context.Context, name string) (int, error) {
	s, err := kv.read(ctx, name, 0)
	defer s.clear()
	if err != nil {
		return 0, err
	}
	version := s.Data.Metadata.Version
	if err := kv.keepsAll(ctx, name, version+1); err != nil {
		return 0, fmt.Errorf("rotate %s: %w", kv.dataPath(name), err)
	}
	key := make([]byte, 32)
	defer clear(key)
	rand.Read(key) // never fails
	value := []byte{'"'}
	if kv.encoding == "hex" {
		value = hex.AppendEncode(value, key)
	} else {
		value = base64.StdEncoding.AppendEncode(value, key)
	}
	clear(s.Data.Data[kv.field])
	s.Data.Data[kv.field] = append(value, '"') // cleared with s
	body, err := json.Marshal(map[string]any{"options": map[string]int{"cas": version}, "data": s.Data.Data})
	if err != nil {
		return 0, errors.New("a secret that was read can't be written") // err may quote it
	}
	defer clear(body)
	var answer struct {
		Data struct {
			Version int `json:"version"`
		} `json:"data"`
	}
	if err := kv.do(ctx, request{path: kv.dataPath(name), body: body}, &answer); err != nil {
		return 0, err
	}
	if answer.Data.Version != version+1 {
		return 0, fmt.Errorf("the Vault at %s: %s: %w: it made version %d, not %d", kv.address, kv.dataPath(name), kms.ErrUnavailable, answer.Data.Version, version+1)
	}
	return answer.Data.Version, nil
}

// keepsAll makes sure that the engine does not forget an old version, and with
// it a key that images are still encrypted with, when it gets a new one: it
// keeps the last ten by default.
func (kv rotatingKeyValue) keepsAll(ctx context.Context, name string, next int) error {
	var metadata struct {
		Data struct {
			Keeps    int `json:"max_versions"`
			Versions map[int]struct {
				Destroyed bool `json:"destroyed"`
			} `json:"versions"`
		} `json:"data"`
	}
	if err := kv.do(ctx, request{path: kv.mount + "/metadata/" + name}, &metadata); err != nil {
		return err
	}
	oldest := next
	for v, version := range metadata.Data.Versions {
		if !version.Destroyed {
			oldest = min(oldest, v)
		}
	}
	need := next - oldest + 1
	if metadata.Data.Keeps >= need {
		return nil
	}
	var engine struct {
		Data struct {
			Keeps int `json:"max_versions"`
		} `json:"data"`
	}
	if err := kv.do(ctx, request{path: kv.mount + "/config"}, &engine); err != nil {
		return err
	}
	keeps := cmp.Or(max(metadata.Data.Keeps, engine.Data.Keeps), 10)
	if keeps < need {
		return fmt.Errorf("the Vault at %s keeps %d versions and would forget version %d: vault kv metadata put -max-versions=%d -mount=%s %s, or destroy that version if no image needs it",
			kv.address, keeps, oldest, need+90, kv.mount, name)
	}
	return nil
}

// checkSize refuses what can't be an AES key.
func checkSize(key []byte) error {
	switch len(key) {
	case 16, 24, 32:
		return nil
	}
	return fmt.Errorf("%w: it is not an AES key: %d bytes, not 32 (or 16 or 24, for the original's format only)", kms.ErrUnavailable, len(key))
}
