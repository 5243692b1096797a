//go:build !no_vault

package vault

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/copilot/kms"
)

type transitSettings struct {
	settings
}

// transit wraps with keys of a transit engine of a Vault. A path is the
// name of a key, as "team-a", or the one of Vault's API, as
// "transit/keys/team-a". What Wrap returns is Vault's ciphertext, as
// "vault:v1:…".
type transit struct {
	*engine
	rotating chan struct{} // holds one during a rotation
}

func openTransit(decode kms.Settings) (kms.Backend, error) {
	var s transitSettings
	if err := decode(&s); err != nil {
		return nil, err
	}
	v, err := openEngine(s.settings, "transit")
	if err != nil {
		return nil, err
	}
	return transit{v, make(chan struct{}, 1)}, nil
}

// transitName matches what Vault takes as the name of a key.
var transitName = regexp.MustCompile(`^\w([\w.-]{0,126}\w)?$`)

func (t transit) name(path string) (string, error) {
	name := strings.TrimPrefix(path, t.mount+"/keys/")
	if !transitName.MatchString(name) {
		return "", fmt.Errorf("path %.100q: a transit key's name has letters, digits, and within it also . and -", path)
	}
	return name, nil
}

// ask writes to a path of the engine that acts with a key.
func (t transit) ask(ctx context.Context, path string, question, answer any) error {
	body, err := json.Marshal(question)
	if err != nil {
		return err
	}
	defer clear(body)
	err = t.do(ctx, request{path: t.mount + "/" + path, body: body}, answer)
	if r, ok := refused(err, http.StatusBadRequest, "key not found"); ok {
		r.kind = kms.ErrNotFound
	}
	return err
}

// Wrap implements [kms.Wrapper].
func (t transit) Wrap(ctx context.Context, path string, plaintext []byte) (int, []byte, error) {
	name, err := t.name(path)
	if err != nil {
		return 0, nil, err
	}
	var answer struct {
		Data struct {
			Ciphertext string `json:"ciphertext"`
		} `json:"data"`
	}
	question := struct {
		Plaintext []byte `json:"plaintext"`
	}{plaintext}
	if err := t.ask(ctx, "encrypt/"+name, question, &answer); err != nil {
		if r, ok := refused(err, http.StatusForbidden); ok && !r.token {
			r.hint += ", or there is no such key, which it would then make: vault write -f " + t.mount + "/keys/" + name
		}
		return 0, nil, err
	}
	version, ok := ciphertextVersion(answer.Data.Ciphertext)
	if !ok {
		return 0, nil, fmt.Errorf("the Vault at %s: wrap with %s: %w: it answers with no ciphertext of a transit engine", t.address, name, kms.ErrUnavailable)
	}
	return version, []byte(answer.Data.Ciphertext), nil
}

// ciphertextVersion returns N of "vault:vN:…".
func ciphertextVersion(ciphertext string) (int, bool) {
	rest, ok := strings.CutPrefix(ciphertext, "vault:v")
	number, rest, ok2 := strings.Cut(rest, ":")
	version, err := strconv.Atoi(number)
	return version, ok && ok2 && err == nil && version > 0 && strconv.Itoa(version) == number && rest != ""
}

// Unwrap implements [kms.Wrapper].
func (t transit) Unwrap(ctx context.Context, path string, version int, wrapped []byte) ([]byte, error) {
	name, err := t.name(path)
	if err != nil {
		return nil, err
	}
	if v, ok := ciphertextVersion(string(wrapped)); !ok || v != version || len(wrapped) > 64<<10 {
		return nil, fmt.Errorf("%w: it is not what a transit engine wraps with version %d", kms.ErrUnwrap, version)
	}
	var answer struct {
		Data struct {
			Plaintext []byte `json:"plaintext"`
		} `json:"data"`
	}
	question := struct {
		Ciphertext string `json:"ciphertext"`
	}{string(wrapped)}
	err = t.ask(ctx, "decrypt/"+name, question, &answer)
	if r, ok := refused(err, http.StatusBadRequest, "too old", "too new"); ok {
		r.kind = kms.ErrNotFound
		r.hint = fmt.Sprintf("version %d: see min_decryption_version and latest_version of %s/keys/%s", version, t.mount, name)
	} else if r, ok := refused(err, http.StatusBadRequest); ok && r.kind != kms.ErrNotFound {
		r.kind = kms.ErrUnwrap
	}
	if err == nil && len(answer.Data.Plaintext) == 0 {
		err = fmt.Errorf("the Vault at %s: unwrap with %s: %w: it answers with no plaintext", t.address, name, kms.ErrUnavailable)
	}
	return answer.Data.Plaintext, err
}

// rotations is how often a rotation is tried that the server refuses with a 500.
const rotations = 10

// Rotate implements [kms.Rotator].
//
// OpenBao answers 500 to some of the rotations that come at the same time. Their
// versions exist in its memory, where the next encryption uses them, and are stored
// with the next rotation that succeeds; if there is none, they are lost at its next
// restart (2.7.2, findings/openbao-transit-rotate-at-once.sh). So Rotate makes one at
// a time, and tries until it succeeds.
func (t transit) Rotate(ctx context.Context, path string) (int, error) {
	name, err := t.name(path)
	if err != nil {
		return 0, err
	}
	var key struct {
		Data struct {
			Latest int `json:"latest_version"`
		} `json:"data"`
	}
	var answer json.RawMessage // old servers have none
	select {
	case t.rotating <- struct{}{}:
		defer func() { <-t.rotating }()
	case <-ctx.Done():
		return 0, fmt.Errorf("the Vault at %s: rotate %s: %w: other rotations take long: %w", t.address, name, kms.ErrUnavailable, ctx.Err())
	}
	for try := 1; ; try++ {
		err := t.ask(ctx, "keys/"+name+"/rotate", struct{}{}, &answer)
		if err == nil {
			break
		}
		r, ok := refused(err, http.StatusInternalServerError)
		if ok && try == rotations {
			r.hint = "rotate it again until that succeeds: until then OpenBao may use a version that it loses when it restarts"
		}
		if !ok || try == rotations {
			return 0, err
		}
		select {
		case <-ctx.Done():
			return 0, err
		case <-time.After(time.Duration(try) * 50 * time.Millisecond):
		}
	}
	if json.Unmarshal(answer, &key) != nil || key.Data.Latest == 0 {
		if err := t.do(ctx, request{path: t.mount + "/keys/" + name}, &key); err != nil {
			return 0, err
		}
	}
	if key.Data.Latest < 1 {
		return 0, fmt.Errorf("the Vault at %s: rotate %s: %w: it returns no latest_version", t.address, name, kms.ErrUnavailable)
	}
	return key.Data.Latest, nil
}
