package mirror

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/image/registry"
)

// list passes on a page of the list of tags, or of referrers. Referrers of a plain image
// are those that were pushed for it, such as signatures made before it was encrypted.
func (m *Mirror) list(w *answer, r *http.Request, repo *repository) error {
	query := url.Values{}
	for _, name := range []string{"n", "last", "artifactType"} {
		if values, ok := r.URL.Query()[name]; ok {
			query[name] = values
		}
	}
	leave, err := m.documents.enter(r.Context(), w.work())
	if err != nil {
		return err
	}
	defer leave()
	page, err := repo.List(r.Context(), query, repo.kind, repo.object)
	if err != nil {
		return err
	}
	if !isList(repo.kind, page.Content) {
		return fmt.Errorf("%s: %w", repo.registry, errNoList)
	}
	if page.Filters != "" {
		w.Header().Set("OCI-Filters-Applied", page.Filters)
	}
	if link := next(repo.target, page); link != "" {
		w.Header().Set("Link", link)
	}
	w.json(listTypes[repo.kind], page.Content)
	return nil
}

// listTypes are the media types of lists.
var listTypes = map[string]string{"tags": "application/json", "referrers": ocispec.MediaTypeImageIndex}

// errNoList is the error of an answer to a request for a list.
var errNoList = errors.New("the answer is not a list of a registry's")

// isList reports whether a document is a list of that kind. What else a host answers, which
// may be none of a registry's, is not for callers.
func isList(kind string, doc []byte) bool {
	var list struct {
		Tags      json.RawMessage `json:"tags"`
		Manifests json.RawMessage `json:"manifests"`
	}
	if json.Unmarshal(doc, &list) != nil {
		return false
	}
	if kind == "tags" {
		return list.Tags != nil
	}
	return list.Manifests != nil
}

// next returns where the page after this one is, by the names that the request has.
func next(t target, page registry.Page) string {
	if page.Next == nil {
		return ""
	}
	query := page.Next
	if t.ns != "" {
		query.Set("ns", t.ns)
	}
	u := url.URL{Path: "/v2/" + t.name + "/" + t.kind + "/" + t.object, RawQuery: query.Encode()}
	return "<" + u.String() + `>; rel="next"`
}
