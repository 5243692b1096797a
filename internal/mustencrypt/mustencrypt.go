// Package mustencrypt has the rules which images must be encrypted: the setting
// must-be-encrypted of pilot.toml.
package mustencrypt

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/ctrlplane/pilot/internal/glob"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// Rule says of the images of some repositories that all their layers must be encrypted.
type Rule struct {
	// Images are patterns of repositories with their registries, as in
	// registry.example.com/team-a/**. One matches if all of the name does.
	Images []string `json:"images"`
	// KEKs are patterns of KEKs, one of which must open each layer. None: any KEK of the
	// broker's.
	KEKs []string `json:"keks,omitempty"`
}

// Rules are in the order of the file.
type Rules []Rule

const maxPatterns = 1024 // of one rule, and rules

// UnmarshalText reads rules from JSON, which the tables of pilot.toml become.
func (r *Rules) UnmarshalText(b []byte) error {
	*r = nil
	if len(bytes.TrimSpace(b)) == 0 {
		return nil
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	var rules []Rule // of which a Rules is made of text, and not of JSON
	if err := d.Decode(&rules); err != nil {
		return fmt.Errorf("it takes tables of the settings images and keks, each an array of strings: %w", err)
	}
	if len(rules) > maxPatterns {
		return fmt.Errorf("%d rules are more than %d", len(rules), maxPatterns)
	}
	for i, rule := range rules {
		if err := rule.check(); err != nil {
			return fmt.Errorf("rule %d: %w", i+1, err)
		}
	}
	*r = rules
	return nil
}

func (r Rule) check() error {
	if len(r.Images) == 0 {
		return errors.New("images is missing: name repositories, as in images = [\"registry.example.com/team-a/**\"]")
	}
	if len(r.Images)+len(r.KEKs) > maxPatterns {
		return fmt.Errorf("it has more than %d patterns", maxPatterns)
	}
	for _, image := range r.Images {
		first, rest, _ := strings.Cut(image, "/")
		switch {
		case image == "**":
		case strings.ContainsAny(image, " \t\n@"), rest == "":
			return fmt.Errorf("images: %.100q is no pattern of repositories: begin with the registry, as in docker.io/library/* or registry.example.com/team-a/**", image)
		case !strings.ContainsAny(first, ".:*") && first != "localhost":
			return fmt.Errorf("images: %.100q does not begin with a registry: write docker.io/%s for Docker Hub", image, image)
		case strings.Contains(rest[strings.LastIndex(rest, "/")+1:], ":"):
			return fmt.Errorf("images: %.100q has a tag: a rule is for whole repositories", image)
		}
	}
	for _, kek := range r.KEKs {
		if err := wireformat.ValidateKEKID(kek); err != nil {
			return fmt.Errorf("keks: %w", err)
		}
	}
	return nil
}

// String returns the rules as UnmarshalText takes them, or "".
func (r *Rules) String() string {
	if len(*r) == 0 {
		return ""
	}
	b, err := json.Marshal(*r)
	if err != nil {
		panic(err) // of strings
	}
	return string(b)
}

// For returns the rules that are for a repository, such as docker.io/library/nginx.
func (r Rules) For(repository string) []Rule {
	return r.matching(func(pattern string) bool { return glob.MatchPath(pattern, repository) })
}

// ForSource returns the rules that are for a repository of [Sources]. containerd leaves out
// the registry's port there, so it may be that of another port.
func (r Rules) ForSource(repository string) []Rule {
	return r.matching(func(pattern string) bool { return glob.MatchPath(withoutPort(pattern), repository) })
}

func (r Rules) matching(matches func(pattern string) bool) (rules []Rule) {
	for _, rule := range r {
		if slices.ContainsFunc(rule.Images, matches) {
			rules = append(rules, rule)
		}
	}
	return rules
}

// withoutPort removes the port of the registry that a pattern begins with, and the brackets
// of an IPv6 address, as [net/url.URL.Hostname] does.
func withoutPort(pattern string) string {
	registry, path, ok := strings.Cut(pattern, "/")
	if !ok {
		return pattern
	}
	if i := strings.LastIndex(registry, ":"); i >= 0 && !strings.HasSuffix(registry, "]") {
		registry = registry[:i]
	}
	return strings.Trim(registry, "[]") + "/" + path
}

// sourceLabel begins the labels by which containerd says which repositories it has fetched a
// blob from: the registry follows, and the value has the repositories with commas between
// them.
const sourceLabel = "containerd.io/distribution.source."

// Sources returns the repositories that a blob's labels name, such as
// docker.io/library/nginx, without the port of the registry.
func Sources(labels map[string]string) (repositories []string) {
	for key, value := range labels {
		registry, ok := strings.CutPrefix(key, sourceLabel)
		if !ok {
			continue
		}
		for path := range strings.SplitSeq(value, ",") {
			if path != "" {
				repositories = append(repositories, registry+"/"+path)
			}
		}
	}
	return repositories
}

// Alternative are the rules, at least one, all of which a layer has to meet if it is of an
// image of that repository.
type Alternative struct {
	Repository string
	Rules      []Rule
}

// ForAll returns the rules for a layer that came from repositories of [Sources]: it has to
// meet those of one alternative, as it is unknown of which repository the image is, and at
// which port. There is none if one of the repositories has no rule: it may be that one.
func (r Rules) ForAll(repositories []string) (alternatives []Alternative) {
	for _, repository := range slices.Sorted(slices.Values(repositories)) {
		was := len(alternatives)
		for _, port := range r.ports() {
			if rules := r.For(withPort(repository, port)); len(rules) > 0 {
				alternatives = append(alternatives, Alternative{repository, rules})
			}
		}
		if len(alternatives) == was {
			return nil
		}
	}
	return alternatives
}

// ports returns the ports of registries in the patterns, and "".
func (r Rules) ports() []string {
	ports := []string{""}
	for _, rule := range r {
		for _, image := range rule.Images {
			registry, _, _ := strings.Cut(image, "/")
			if i := strings.LastIndex(registry, ":"); i >= 0 && !strings.HasSuffix(registry, "]") && !slices.Contains(ports, registry[i+1:]) {
				ports = append(ports, registry[i+1:])
			}
		}
	}
	return ports
}

// withPort returns a repository of [Sources] as patterns have it, with a port unless it is "".
func withPort(repository, port string) string {
	registry, path, _ := strings.Cut(repository, "/")
	if strings.Contains(registry, ":") {
		registry = "[" + registry + "]"
	}
	if port != "" {
		registry += ":" + port
	}
	return registry + "/" + path
}

// Allows reports whether a rule is content with a layer that a KEK opens.
func (r Rule) Allows(kek string) bool {
	for _, pattern := range r.KEKs {
		if glob.MatchPath(pattern, kek) {
			return true
		}
	}
	return len(r.KEKs) == 0
}

// String describes the rule in errors.
func (r Rule) String() string {
	text := fmt.Sprintf("images of %s must be encrypted", strings.Join(r.Images, ", "))
	if len(r.KEKs) > 0 {
		text += " for " + strings.Join(r.KEKs, " or ")
	}
	return text
}

// NotByRight describes, after a KEK, a layer key that others than those who may wrap with
// that KEK can have wrapped, too.
const NotByRight = "with its public key, as anybody can, or for guests of Confidential Containers, which have the KEK themselves"

// OtherContent describes, after a KEK, a layer that it opens, and of which the wrapped key
// has not the digest.
const OtherContent = "but what is wrapped with it is not the digest of this layer: somebody who can decrypt another layer has encrypted this one under its key, " +
	"or the tool that encrypted it has wrapped the digest of something else, as skopeo does when it compresses layers anew: encrypt the plain image again with ctr-pilot"

// NoDigest describes, after a KEK, a layer that it opens, and of which no digest is wrapped
// with the key.
const NoDigest = "but no digest of the layer is wrapped with its key, so everybody who can decrypt it could put something else in its place: encrypt the plain image again with ctr-pilot"
