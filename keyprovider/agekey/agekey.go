// Package agekey wraps layer keys for recipients of age, and unwraps them with age's
// identities: people's keys, and hardware through age's plugins. What it writes is an age
// file (https://age-encryption.org/v1) that age's own program reads.
package agekey

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"

	"filippo.io/age"
	"filippo.io/age/plugin"
	"filippo.io/age/tag"

	"github.com/ctrlplane/pilot/internal/fips"
	"github.com/ctrlplane/pilot/internal/keyjson"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// ErrRecipient is the error of what begins like a recipient of age, and is none.
var ErrRecipient = errors.New("not a recipient of age")

// maxShown is how many bytes of a recipient [Shown] returns: those that are post-quantum
// have 1,959.
const maxShown = 24

// Shown returns a recipient as it is shown where there is not much room. Other names stay
// as they are.
func Shown(recipient string) string {
	if !wireformat.IsAgeRecipient(recipient) || len(recipient) <= 3*maxShown {
		return recipient
	}
	return recipient[:maxShown] + "…"
}

// refuse is the error of age where its ciphers are not allowed: its library would fail
// later, and wait without end for a post-quantum key that it can't make.
func refuse() error {
	return fips.Refuse("age encrypts with ChaCha20-Poly1305 and X25519", "wrap for a KEK (provider:pilot:KEK)")
}

// recipient is a recipient of age: a native one, or that of a plugin.
type recipient struct {
	native age.Recipient // nil for a plugin's
	plugin string        // the name of the plugin; "" for a native one
}

// parse returns the recipient that a text of the form age1… names. The error wraps
// [ErrRecipient], or [fips.ErrNotApproved].
func parse(text string) (recipient, error) {
	var r recipient
	err := refuse()
	if err != nil {
		return r, err
	}
	switch {
	case !strings.HasPrefix(text, "age1"):
		err = errors.New("it is not in lower case")
	case strings.HasPrefix(text, "age1tag1"), strings.HasPrefix(text, "age1tagpq1"):
		r.native, err = asRecipient(tag.ParseRecipient(text))
	case strings.HasPrefix(text, "age1pq1"):
		r.native, err = asRecipient(age.ParseHybridRecipient(text))
	case strings.Count(text, "1") > 1:
		r.plugin, _, err = plugin.ParseRecipient(text)
	default:
		r.native, err = asRecipient(age.ParseX25519Recipient(text))
	}
	if err != nil {
		return recipient{}, fmt.Errorf("%.60q is %w (%s): check how it is spelled; names that begin with age1 are never those of KEKs", text, ErrRecipient, reason(err))
	}
	return r, nil
}

func asRecipient[R age.Recipient](r R, err error) (age.Recipient, error) { return r, err }

// reason returns the end of an error of age's, which quotes the recipient before.
func reason(err error) string {
	text := err.Error()
	if i := strings.LastIndex(text, "\": "); i >= 0 {
		text = text[i+3:]
	}
	return text
}

// Check reports whether a text is a recipient. The error wraps [ErrRecipient].
func Check(text string) error {
	_, err := parse(text)
	return err
}

// Wrap encrypts a layer key for a recipient. A plugin gets 15 seconds. The error wraps
// [ErrRecipient] if it is none, and [ErrNoPlugin] if its plugin is not installed.
func Wrap(ctx context.Context, to string, layerKey []byte) ([]byte, error) {
	r, err := parse(to)
	if err != nil {
		return nil, err
	}
	var wrapped []byte
	if r.plugin != "" {
		wrapped, err = runPlugin(ctx, r.plugin, pluginRequest{Recipient: to, Data: layerKey})
	} else {
		wrapped, err = encrypt(r.native, layerKey)
	}
	if err == nil && len(wrapped) > wireformat.MaxAge {
		err = fmt.Errorf("the wrapped key has %d bytes, and at most %d are possible", len(wrapped), wireformat.MaxAge)
	}
	if err != nil {
		return nil, fmt.Errorf("wrap for %s: %w", Shown(to), err)
	}
	return wrapped, nil
}

func encrypt(to age.Recipient, layerKey []byte) ([]byte, error) {
	var b bytes.Buffer
	w, err := age.Encrypt(&b, to)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(layerKey); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

func decrypt(wrapped []byte, ids ...age.Identity) ([]byte, error) {
	r, err := age.Decrypt(bytes.NewReader(wrapped), ids...)
	if err != nil {
		return nil, err
	}
	layerKey, err := keyjson.ReadAll(r)
	if err != nil {
		clear(layerKey)
		return nil, err
	}
	return layerKey, nil
}
