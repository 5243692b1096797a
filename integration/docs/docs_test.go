package docs

import (
	"regexp"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// pages returns the pages of the documentation.
func pages(t testing.TB) map[string]*harness.Page {
	t.Helper()
	return harness.PagesBelow(t, harness.Repo, "SECURITY.md")
}

// matches reports whether a command printed what the page shows, in which … stands
// for anything.
func matches(s harness.Shown, printed string) bool {
	pattern := strings.ReplaceAll(regexp.QuoteMeta(strings.TrimSpace(s.Output)), "…", ".*")
	return regexp.MustCompile(`(?s)^` + pattern + `$`).MatchString(strings.TrimSpace(printed))
}
