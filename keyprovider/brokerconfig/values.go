package brokerconfig

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/ctrlplane/pilot/internal/setting"
	"github.com/ctrlplane/pilot/internal/wireformat"
	"github.com/ctrlplane/pilot/keyprovider"
)

// URLs are URLs, separated by commas in text.
type URLs []string

// String returns the text of the URLs.
func (u *URLs) String() string { return strings.Join(*u, ",") }

// UnmarshalText reads URLs.
func (u *URLs) UnmarshalText(b []byte) error {
	return setting.Words((*[]string)(u), b, func(url string, _ []string) error {
		if url == "" {
			return errors.New("a URL is empty")
		}
		return nil
	})
}

// ProviderNames are names of a key provider, separated by commas in text.
type ProviderNames []string

// String returns the text of the names.
func (n *ProviderNames) String() string { return strings.Join(*n, ",") }

// UnmarshalText reads names.
func (n *ProviderNames) UnmarshalText(b []byte) error {
	return setting.Words((*[]string)(n), b, func(name string, before []string) error {
		switch {
		case name == "":
			return errors.New("a name is empty")
		case strings.ContainsAny(name, ": "):
			return fmt.Errorf("%.60q can't be the name of a key provider: it has a colon or a space", name)
		case slices.Contains(before, name):
			return fmt.Errorf("duplicate name %q", name)
		}
		return nil
	})
}

// KEKIDs are the ids of KEKs, separated by commas in text.
type KEKIDs []string

// String returns the text of the ids.
func (k *KEKIDs) String() string { return strings.Join(*k, ",") }

// UnmarshalText reads ids.
func (k *KEKIDs) UnmarshalText(b []byte) error {
	return setting.Words((*[]string)(k), b, func(id string, _ []string) error { return wireformat.ValidateKEKID(id) })
}

// TokenSource is where a token for the broker comes from: github-actions or env:NAME.
type TokenSource string

// GitHubActions is the source of a GitHub Actions job's own tokens.
const GitHubActions TokenSource = "github-actions"

// variableName matches the names of environment variables.
var variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// UnmarshalText reads a source.
func (s *TokenSource) UnmarshalText(b []byte) error {
	v := TokenSource(b)
	if v != GitHubActions && !variableName.MatchString(v.variable()) {
		// It may be a token itself, which must not be repeated.
		return errors.New("it is neither github-actions nor env:NAME with the name of a variable, as in env:COPILOT_TOKEN")
	}
	*s = v
	return nil
}

// variable returns the name of the environment variable, or "".
func (s TokenSource) variable() string {
	name, ok := strings.CutPrefix(string(s), "env:")
	if !ok {
		return ""
	}
	return name
}

// KBSKEKs say which KEKs a KBS of Confidential Containers has: URI=KEK, or URI=KEK@VERSION if
// that is not version 1, separated by commas in text.
type KBSKEKs []string

// String returns the text of the list.
func (k *KBSKEKs) String() string { return strings.Join(*k, ",") }

// UnmarshalText reads the list.
func (k *KBSKEKs) UnmarshalText(b []byte) error {
	return setting.Words((*[]string)(k), b, func(word string, before []string) error {
		uri, _, err := parseKBSKEK(word)
		if err != nil {
			return err
		}
		for _, other := range before {
			if had, _, _ := parseKBSKEK(other); had == uri {
				return fmt.Errorf("duplicate URI %s", uri)
			}
		}
		return nil
	})
}

// byURI returns the KEKs by canonical URIs. The list was read by UnmarshalText.
func (k *KBSKEKs) byURI() map[string]keyprovider.KBSKEK {
	keks := make(map[string]keyprovider.KBSKEK)
	for _, word := range *k {
		uri, kek, _ := parseKBSKEK(word)
		keks[uri] = kek
	}
	return keks
}

func parseKBSKEK(word string) (uri string, kek keyprovider.KBSKEK, err error) {
	uri, kek.ID, _ = strings.Cut(word, "=")
	if uri, err = wireformat.CanonicalKID(uri); err != nil {
		return "", kek, err
	}
	if _, _, ok := wireformat.ParsePluginKID(uri); ok {
		return "", kek, fmt.Errorf("%s says itself which KEK and version it is: leave it out", uri)
	}
	kek.Version = 1
	if i := strings.LastIndexByte(kek.ID, '@'); i >= 0 {
		if version, err := strconv.Atoi(kek.ID[i+1:]); err == nil && version > 0 {
			kek.ID, kek.Version = kek.ID[:i], version
		}
	}
	return uri, kek, wireformat.ValidateKEKID(kek.ID)
}
