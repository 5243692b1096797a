package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// maxList bounds one page of a list, in bytes.
const maxList = 8 << 20

// ErrTooLarge is the error of a manifest, an index or a list that is too large to be read.
var ErrTooLarge = errors.New("too large")

// Page is a page of a list of a registry's.
type Page struct {
	MediaType string
	Content   []byte
	// Filters are the filters that the registry has applied, as in its header
	// OCI-Filters-Applied.
	Filters string
	// Next is the query of the next page, or nil if this is the last one.
	Next url.Values
}

// List returns one page of a list: elements are tags and list, or referrers and a digest.
// The query is that of the distribution specification:
// https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md#content-discovery.
func (r *Repository) List(ctx context.Context, query url.Values, elements ...string) (page Page, err error) {
	err = r.ask(ctx, func(ctx context.Context, h *host) error {
		page, err = h.page(ctx, 1, query, elements...)
		return err
	})
	return page, err
}

// page returns one page of a list, for which it makes so many attempts.
func (h *host) page(ctx context.Context, attempts int, query url.Values, elements ...string) (Page, error) {
	resp, err := h.do(ctx, request{method: http.MethodGet, url: h.url(query, elements...), attempts: attempts, most: maxList + 1}, http.StatusOK)
	if err != nil {
		return Page{}, err
	}
	page := Page{MediaType: resp.Header.Get("Content-Type"), Filters: resp.Header.Get("OCI-Filters-Applied")}
	if page.Content, err = io.ReadAll(resp.Body); err != nil {
		return Page{}, err
	}
	if len(page.Content) > maxList {
		return Page{}, fmt.Errorf("%w: %s has a list of more than %d bytes", ErrTooLarge, h.Host, maxList)
	}
	page.Next = nextPage(resp)
	return page, nil
}

// ask calls do with the hosts that resolve tags, with the right to pull, until one succeeds.
// The error is that of the last.
func (r *Repository) ask(ctx context.Context, do func(context.Context, *host) error) error {
	ctx, err := docker.ContextWithRepositoryScope(ctx, r.spec, false)
	if err != nil {
		return err
	}
	err = fmt.Errorf("no host of %s resolves tags: %w", r.spec.Hostname(), errdefs.ErrNotFound)
	for _, h := range r.resolve {
		if err = do(ctx, h); err == nil || ctx.Err() != nil {
			break
		}
	}
	return err
}

// Size asks the registry for a blob and returns its size in bytes, once, whatever it has
// answered before. The error wraps [errdefs.ErrNotFound] if the blob is not there.
func (r *Repository) Size(ctx context.Context, d digest.Digest) (size int64, err error) {
	err = r.ask(ctx, func(ctx context.Context, h *host) error {
		resp, err := h.do(ctx, request{method: http.MethodHead, url: h.url(nil, "blobs", d.String()), attempts: 1}, http.StatusOK)
		if err == nil && resp.ContentLength < 0 {
			err = fmt.Errorf("%s does not report the size of %s", h.Host, d)
		}
		if err == nil {
			size = resp.ContentLength
		}
		return err
	})
	return size, err
}

// tagsPerPage is how many tags are requested at once.
const tagsPerPage = 1000

// Tags returns the repository's first tags, in the registry's order, at most so many.
func (r *Repository) Tags(ctx context.Context, most int) (all []string, err error) {
	err = r.ask(ctx, func(ctx context.Context, h *host) error {
		all, err = h.tags(ctx, most)
		return err
	})
	return all, err
}

func (h *host) tags(ctx context.Context, most int) (all []string, err error) {
	query := url.Values{"n": {fmt.Sprint(min(most, tagsPerPage))}}
	for query != nil && len(all) < most {
		page, err := h.page(ctx, attempts, query, "tags", "list")
		if err != nil {
			return nil, err
		}
		var list struct {
			Tags []string `json:"tags"`
		}
		if err := json.Unmarshal(page.Content, &list); err != nil {
			return nil, fmt.Errorf("%s: the list of tags: %w", h.Host, err)
		}
		if all, query = append(all, list.Tags...), page.Next; len(list.Tags) == 0 {
			break
		}
	}
	return all[:min(len(all), most)], nil
}

// nextPage returns the query of the next page in an answer's Link header (RFC 8288), or
// nil.
func nextPage(resp *http.Response) url.Values {
	for _, link := range resp.Header.Values("Link") {
		target, params, ok := strings.Cut(strings.TrimPrefix(strings.TrimSpace(link), "<"), ">")
		if !ok || !strings.Contains(strings.ReplaceAll(strings.ToLower(params), `"`, ""), "rel=next") {
			continue
		}
		if u, err := resp.Request.URL.Parse(target); err == nil {
			query := u.Query()
			query.Del("ns")
			return query
		}
	}
	return nil
}
