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
func (r *Repository) List(ctx context.Context, query url.Values, elements ...string) (Page, error) {
	ctx, err := r.querying(ctx)
	if err != nil {
		return Page{}, err
	}
	return r.lists.page(ctx, 1, query, elements...)
}

// page returns one page of a list, for which it makes so many attempts.
func (h *pushHost) page(ctx context.Context, attempts int, query url.Values, elements ...string) (Page, error) {
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

// querying returns a context with which requests get the right to pull.
func (r *Repository) querying(ctx context.Context) (context.Context, error) {
	if r.lists == nil {
		return nil, fmt.Errorf("no host of %s resolves tags: %w", r.spec.Hostname(), errdefs.ErrNotFound)
	}
	return docker.ContextWithRepositoryScope(ctx, r.spec, false)
}

// Size asks the registry for a blob and returns its size in bytes, once, whatever it has
// answered before. The error wraps [errdefs.ErrNotFound] if the blob is not there.
func (r *Repository) Size(ctx context.Context, d digest.Digest) (int64, error) {
	ctx, err := r.querying(ctx)
	if err != nil {
		return 0, err
	}
	resp, err := r.lists.do(ctx, request{method: http.MethodHead, url: r.lists.url(nil, "blobs", d.String()), attempts: 1}, http.StatusOK)
	if err != nil {
		return 0, err
	}
	if resp.ContentLength < 0 {
		return 0, fmt.Errorf("%s does not say how large %s is", r.lists.Host, d)
	}
	return resp.ContentLength, nil
}

// Tags returns the repository's first tags, in the registry's order, at most so many.
func (r *Repository) Tags(ctx context.Context, most int) ([]string, error) {
	query := url.Values{"n": {fmt.Sprint(most)}}
	var all []string
	for query != nil && len(all) < most {
		page, err := r.List(ctx, query, "tags", "list")
		if err != nil {
			return nil, err
		}
		var list struct {
			Tags []string `json:"tags"`
		}
		if err := json.Unmarshal(page.Content, &list); err != nil {
			return nil, fmt.Errorf("the list of tags: %w", err)
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
