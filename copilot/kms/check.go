package kms

import (
	"fmt"
	"net/url"

	"github.com/ctrlplane/pilot/internal/loopback"
)

// checkPlaintext refuses what a [Wrapper] need not take.
func checkPlaintext(plaintext []byte) error {
	if n := len(plaintext); n < 1 || n > MaxPlaintext {
		return fmt.Errorf("plaintext has %d bytes, not 1 to %d", n, MaxPlaintext)
	}
	return nil
}

// checkURL refuses where keys would cross a network in plain.
func checkURL(name, value string) error {
	u, err := url.Parse(value)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("%s = %q: it is not https://HOST or https://HOST:PORT", name, value)
	}
	if u.Scheme == "https" || u.Scheme == "http" && loopback.Is(u.Hostname()) {
		return nil
	}
	return fmt.Errorf("%s = %q: keys would cross the network in plain: use https", name, value)
}

// checkOnlyVersion refuses a version that a KMS which keeps them to itself
// never tells.
func checkOnlyVersion(version int) error {
	if version != 1 {
		return fmt.Errorf("%w: version %d of a key whose KMS keeps versions to itself", ErrUnwrap, version)
	}
	return nil
}
