package main

import (
	"context"
	"fmt"
	"regexp"
	"strings"

	"github.com/ctrlplane/pilot/image/registry"
	"github.com/ctrlplane/pilot/image/transport"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/glob"
)

// maxTags bounds the tags of a repository.
const maxTags = 1_000_000

// aTag matches the tags that the distribution specification allows.
var aTag = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$`)

// tagNames returns the names of the tags in a repository that match a pattern, as in
// registry.example.com/app:*.
func (p *places) tagNames(ctx context.Context, pattern string) ([]string, error) {
	colon := strings.LastIndex(pattern, ":")
	if colon <= strings.LastIndex(pattern, "/") || isPattern(pattern[:colon]) || strings.Contains(pattern, "@") {
		return nil, exit.Usagef("in a registry, patterns match tags, as in 'registry.example.com/app:*'")
	}
	repository, tagPattern := pattern[:colon], pattern[colon+1:]
	if _, err := parseName(transport.Registry + "://" + repository + ":x"); err != nil {
		return nil, err
	}
	repo, err := registry.Open(ctx, repository+":x", p.hosts)
	if err != nil {
		return nil, err
	}
	tags, err := repo.Tags(ctx, maxTags+1)
	if err == nil && len(tags) > maxTags {
		err = fmt.Errorf("there are more than %d", maxTags)
	}
	if err != nil {
		return nil, fmt.Errorf("list the tags of %s: %w", repository, err)
	}
	var names []string
	for _, tag := range tags {
		if aTag.MatchString(tag) && glob.MatchName(tagPattern, tag) {
			names = append(names, repository+":"+tag)
		}
	}
	return names, nil
}
