package mirror

import (
	"net/http"
	"net/url"

	"github.com/ctrlplane/pilot/image/registry"
)

// list passes on a page of the list of tags, or of referrers. Referrers of a plain image
// are those that were pushed for it, such as signatures made before it was encrypted.
func (m *Mirror) list(w *answer, r *http.Request, repo *repository) error {
	query := r.URL.Query()
	query.Del("ns") // the rest may be the registry's own: its links to further pages have it
	page, err := repo.List(r.Context(), query, repo.kind, repo.object)
	if err != nil {
		return err
	}
	if page.Filters != "" {
		w.Header().Set("OCI-Filters-Applied", page.Filters)
	}
	if link := next(repo.target, page); link != "" {
		w.Header().Set("Link", link)
	}
	w.json(page.MediaType, page.Content)
	return nil
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
