package docs

import (
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// pages returns the pages of the documentation.
func pages(t testing.TB) map[string]*harness.Page {
	t.Helper()
	return harness.PagesBelow(t, harness.Repo, "SECURITY.md", "CONTRIBUTING.md")
}
