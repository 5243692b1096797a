package mirror

import (
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/ctrlplane/pilot/internal/glob"
)

// target is what a request is about.
type target struct {
	registry   string // as in registry.example.com:5000
	repository string // as in team/app
	kind       string // manifests, blobs, tags or referrers
	object     string // a tag or a digest
	name       string // the repository as the request names it
	ns         string // the registry as the request names it, or ""
}

// reference returns the name of the object in the registry.
func (t target) reference() string {
	if digest.Digest(t.object).Validate() == nil {
		return t.registry + "/" + t.repository + "@" + t.object
	}
	return t.registry + "/" + t.repository + ":" + t.object
}

// key identifies the repository.
func (t target) key() string { return t.registry + "/" + t.repository }

// digest returns the object's digest, or "" if it is a tag.
func (t target) digest() digest.Digest {
	if d := digest.Digest(t.object); d.Validate() == nil {
		return d
	}
	return ""
}

// The grammar of the distribution specification, and what a registry's name may be.
var (
	aRepository = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)
	aTag        = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)
	aRegistry   = regexp.MustCompile(`^([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?$`)
)

// maxName bounds the name of a repository, in bytes, with its registry: what clients take.
const maxName = 255

// CheckRegistry returns an error if this is not the name of a registry.
func CheckRegistry(name string) error {
	if len(name) > maxName || !aRegistry.MatchString(name) {
		return fmt.Errorf("%.80q is not a registry such as registry.example.com:5000", name)
	}
	return nil
}

// parse finds out what a request is about.
func (m *Mirror) parse(r *http.Request) (target, error) {
	var t target
	path, ok := strings.CutPrefix(r.URL.Path, "/v2/")
	words := strings.Split(path, "/")
	if !ok || len(words) < 3 {
		return t, &requestError{http.StatusNotFound, "UNSUPPORTED", "a mirror has manifests, blobs, the list of tags and referrers below /v2/NAME/"}
	}
	n := len(words) - 2
	t.name, t.kind, t.object = strings.Join(words[:n], "/"), words[n], words[n+1]
	switch {
	case t.kind == "manifests" && (aTag.MatchString(t.object) || t.digest() != ""):
	case (t.kind == "blobs" || t.kind == "referrers") && t.digest() != "":
	case t.kind == "tags" && t.object == "list":
	case t.kind == "manifests" || t.kind == "blobs" || t.kind == "referrers":
		return t, &requestError{http.StatusBadRequest, "DIGEST_INVALID", fmt.Sprintf("%.140q is neither a digest nor a tag that %s can have", t.object, t.kind)}
	default:
		t.kind = "other"
		return t, &requestError{http.StatusNotFound, "UNSUPPORTED", "a mirror has manifests, blobs, the list of tags and referrers below /v2/NAME/"}
	}
	if len(t.name) > maxName || !aRepository.MatchString(t.name) {
		return t, &requestError{http.StatusBadRequest, "NAME_INVALID", fmt.Sprintf("%.80q is not the name of a repository", t.name)}
	}
	t.ns = r.URL.Query().Get("ns")
	switch {
	case t.ns != "":
		t.registry, t.repository = t.ns, t.name
	case m.conf.Upstream != "":
		t.registry, t.repository = m.conf.Upstream, t.name
	default:
		first, rest, ok := strings.Cut(t.name, "/")
		if !ok || !strings.Contains(first, ".") && first != "localhost" {
			return t, &requestError{http.StatusNotFound, "NAME_UNKNOWN", fmt.Sprintf("%s does not begin with its registry, as registry.example.com/team/app does: name it, or set mirror-upstream", t.name)}
		}
		t.registry, t.repository = first, rest
	}
	if err := CheckRegistry(t.registry); err != nil {
		return t, &requestError{http.StatusBadRequest, "NAME_INVALID", err.Error()}
	}
	if !isTrusted(r) && !m.allows(t.registry) {
		return t, &requestError{http.StatusForbidden, "DENIED", t.registry + " is not one of mirror-allowed-upstreams"}
	}
	return t, nil
}

// allows reports whether callers may have the mirror ask a registry.
func (m *Mirror) allows(registry string) bool {
	return len(m.conf.AllowedUpstreams) == 0 || registry == m.conf.Upstream ||
		slices.ContainsFunc(m.conf.AllowedUpstreams, func(pattern string) bool { return glob.MatchName(pattern, registry) })
}
