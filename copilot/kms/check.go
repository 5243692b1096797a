package kms

import (
	"fmt"
	"net/url"

	"github.com/ctrlplane/pilot/internal/loopback"
)

// CheckPlaintext rejects sizes that a [Wrapper] need not accept.
func CheckPlaintext(plaintext []byte) error {
	if n := len(plaintext); n < 1 || n > MaxPlaintext {
		return fmt.Errorf("plaintext has %d bytes, not 1 to %d", n, MaxPlaintext)
	}
	return nil
}

// CheckURL rejects a URL to which keys would be sent unencrypted.
func CheckURL(name, value string) error {
	u, err := url.Parse(value)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("%s = %q: it is not https://HOST or https://HOST:PORT", name, value)
	}
	if u.Scheme == "https" || u.Scheme == "http" && loopback.Is(u.Hostname()) {
		return nil
	}
	return fmt.Errorf("%s = %q: keys would cross the network unencrypted: use https", name, value)
}

// CheckOnlyVersion rejects a version other than 1, for a KMS that does not
// expose its versions.
func CheckOnlyVersion(version int) error {
	if version != 1 {
		return fmt.Errorf("%w: version %d of a key whose KMS keeps versions to itself", ErrUnwrap, version)
	}
	return nil
}
