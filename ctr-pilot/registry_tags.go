package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/containerd/v2/version"
	"github.com/containerd/errdefs"

	"github.com/ctrlplane/pilot/image/transport"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/glob"
)

const (
	tagsPerPage = 1000    // requested
	maxTagPage  = 4 << 20 // bytes
	maxTags     = 1_000_000
	// registryTimeout bounds the wait for one page.
	registryTimeout = time.Minute
)

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
	spec, err := reference.Parse(repository + ":x")
	if err != nil {
		return nil, err
	}
	tags, err := listTags(ctx, p.hosts, spec)
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

// listTags lists a repository's tags, from the first host that has the list:
// https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md#listing-tags.
func listTags(ctx context.Context, registries docker.RegistryHosts, spec reference.Spec) ([]string, error) {
	hosts, err := registries(spec.Hostname())
	if err != nil {
		return nil, err
	}
	if ctx, err = docker.ContextWithRepositoryScope(ctx, spec, false); err != nil {
		return nil, err
	}
	failed := error(errdefs.ErrNotFound)
	for _, host := range hosts {
		if !host.Capabilities.Has(docker.HostCapabilityResolve) {
			continue
		}
		tags, err := tagsAt(ctx, host, spec)
		if err == nil {
			return tags, nil
		}
		failed = err
	}
	return nil, failed
}

func tagsAt(ctx context.Context, host docker.RegistryHost, spec reference.Spec) ([]string, error) {
	query := url.Values{"n": {fmt.Sprint(tagsPerPage)}}
	if at := spec.Hostname(); host.Host != at && !(at == "docker.io" && host.Host == "registry-1.docker.io") {
		query.Set("ns", at) // a mirror of several registries
	}
	next := &url.URL{
		Scheme: host.Scheme, Host: host.Host, RawQuery: query.Encode(),
		Path: host.Path + strings.TrimPrefix(spec.Locator, spec.Hostname()) + "/tags/list",
	}
	var all []string
	for len(all) <= maxTags {
		tags, more, err := tagPage(ctx, host, next)
		if err != nil {
			return nil, err
		}
		all = append(all, tags...)
		if more == nil || len(tags) == 0 {
			return all, nil
		}
		next = more
	}
	return nil, fmt.Errorf("there are more than %d", maxTags)
}

// tagPage returns one page of the list, and where the next one is, or nil.
func tagPage(ctx context.Context, host docker.RegistryHost, at *url.URL) ([]string, *url.URL, error) {
	ctx, cancel := context.WithTimeout(ctx, registryTimeout)
	defer cancel()
	resp, err := authorized(ctx, host, at)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, nil, fmt.Errorf("%s returned %s", at.Host, resp.Status)
	}
	var page struct {
		Tags []string `json:"tags"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxTagPage)).Decode(&page); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", at.Host, err)
	}
	next, err := nextPage(resp.Header, at)
	return page.Tags, next, err
}

// authorized gets a page, with a token if the registry asks for one.
func authorized(ctx context.Context, host docker.RegistryHost, at *url.URL) (*http.Response, error) {
	var answers []*http.Response
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
		if err != nil {
			return nil, err
		}
		req.Header = host.Header.Clone()
		if req.Header == nil {
			req.Header = make(http.Header)
		}
		req.Header.Set("User-Agent", "containerd/"+version.Version)
		if host.Authorizer != nil {
			if err := host.Authorizer.Authorize(ctx, req); err != nil {
				return nil, err
			}
		}
		resp, err := host.Client.Do(req)
		if err != nil || resp.StatusCode != http.StatusUnauthorized || host.Authorizer == nil || len(answers) > 1 {
			return resp, err
		}
		resp.Body.Close()
		answers = append(answers, resp)
		if err := host.Authorizer.AddResponses(ctx, answers); err != nil {
			return nil, err
		}
	}
}

// nextPage returns the next page in a response's Link header (RFC 8288), or nil.
func nextPage(header http.Header, at *url.URL) (*url.URL, error) {
	for _, link := range header.Values("Link") {
		target, params, ok := strings.Cut(strings.TrimPrefix(strings.TrimSpace(link), "<"), ">")
		if !ok || !strings.Contains(strings.ReplaceAll(strings.ToLower(params), `"`, ""), "rel=next") {
			continue
		}
		u, err := at.Parse(target)
		if err != nil {
			return nil, fmt.Errorf("the address of the list's next page: %w", err)
		}
		// The same registry, even if a proxy in front of it rewrites addresses.
		u.Scheme, u.Host = at.Scheme, at.Host
		return u, nil
	}
	return nil, nil
}
