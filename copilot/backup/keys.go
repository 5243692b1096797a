package backup

import (
	"bytes"
	"fmt"
	"strings"

	"filippo.io/age"
	"filippo.io/age/agessh"

	"github.com/ctrlplane/pilot/internal/fips"
	"github.com/ctrlplane/pilot/internal/regular"
)

// refuse is the error of backups where age's ciphers are not allowed: its library waits
// without end for a key that it can't make.
func refuse() error {
	return fips.Refuse("backups are in the format of age, which encrypts with ChaCha20-Poly1305",
		"run this command without that setting, or back up the database by its own means")
}

// maxKeys bounds a file of recipients or identities, in bytes.
const maxKeys = 1 << 20

// ParseRecipient returns the recipient of an age public key (age1pq1…, age1…) or of an SSH
// public key (ssh-ed25519 …, ssh-rsa …).
func ParseRecipient(text string) (age.Recipient, error) {
	text = strings.TrimSpace(text)
	if strings.HasPrefix(text, "ssh-") {
		r, err := agessh.ParseRecipient(text)
		if err != nil {
			return nil, fmt.Errorf("recipient %q can't be used: %w", Short(text), err)
		}
		return r, nil
	}
	list, err := age.ParseRecipients(strings.NewReader(text))
	if err != nil || len(list) != 1 {
		return nil, fmt.Errorf("recipient %q is neither an age public key (age1pq1… or age1…) nor an SSH one (ssh-ed25519 … or ssh-rsa …)", Short(text))
	}
	return list[0], nil
}

// ParseRecipients is [ParseRecipient] for several. Post-quantum ones can't be together
// with others, which would open the backup to a quantum computer.
func ParseRecipients(texts []string) ([]age.Recipient, error) {
	if err := refuse(); err != nil {
		return nil, err
	}
	var list []age.Recipient
	hybrid := 0
	for _, text := range texts {
		r, err := ParseRecipient(text)
		if err != nil {
			return nil, err
		}
		if _, ok := r.(*age.HybridRecipient); ok {
			hybrid++
		}
		list = append(list, r)
	}
	if hybrid > 0 && hybrid < len(list) {
		return nil, fmt.Errorf("%d of %d recipients are post-quantum ones (age1pq1…), and the others would open the backup to a quantum computer: use one kind", hybrid, len(list))
	}
	return list, nil
}

// Short returns the beginning of a recipient, for people: post-quantum ones have about
// 2,000 characters.
func Short(recipient string) string {
	const most = 40
	if len(recipient) <= most {
		return recipient
	}
	return recipient[:most] + "…"
}

// ReadRecipients reads a file with a recipient on each line. Empty lines and those that
// begin with # do not count.
func ReadRecipients(name string) ([]string, error) {
	b, err := regular.ReadText(name, maxKeys)
	if err != nil {
		return nil, err
	}
	var list []string
	for line := range strings.Lines(string(b)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			list = append(list, line)
		}
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("%s has no recipients", name)
	}
	return list, nil
}

// ReadIdentities reads a file of age identities, as age-keygen writes it, or an SSH private
// key that has no passphrase.
func ReadIdentities(name string) ([]age.Identity, error) {
	if err := refuse(); err != nil {
		return nil, err
	}
	b, err := regular.ReadText(name, maxKeys)
	if err != nil {
		return nil, err
	}
	defer clear(b)
	if bytes.HasPrefix(b, []byte("-----BEGIN")) {
		id, err := agessh.ParseIdentity(b)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		return []age.Identity{id}, nil
	}
	list, err := age.ParseIdentities(bytes.NewReader(b))
	if err != nil { // whose text may quote a secret
		return nil, fmt.Errorf("%s is neither a file of age identities (AGE-SECRET-KEY-…) nor an SSH private key without a passphrase", name)
	}
	return list, nil
}
