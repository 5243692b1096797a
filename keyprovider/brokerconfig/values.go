package brokerconfig

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/ctrlplane/pilot/internal/setting"
	"github.com/ctrlplane/pilot/internal/wireformat"
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
