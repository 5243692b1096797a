package docs

import (
	"go/ast"
	"go/parser"
	gotoken "go/token"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// pages returns the pages of the documentation.
func pages(t testing.TB) map[string]*harness.Page {
	t.Helper()
	return harness.PagesBelow(t, harness.Repo, "SECURITY.md", "CONTRIBUTING.md")
}

// TestDocsNamedFunctions requires that the functions exist, in the files, that the pages
// name as FILE: `FUNCTION` or `TYPE.METHOD` for readers of the code.
func TestDocsNamedFunctions(t *testing.T) {
	t.Parallel()
	named := regexp.MustCompile("\\[([\\w/-]+\\.go)\\]\\(([^)]+)\\)(:\\s`([\\w.]+)`)?")
	found := 0
	for name := range pages(t) {
		for _, m := range named.FindAllStringSubmatch(harness.Read(t, filepath.Join(harness.Repo, name)), -1) {
			file, link, function := m[1], m[2], m[4]
			if function == "" {
				continue
			}
			if filepath.Join(filepath.Dir(name), link) != file {
				t.Errorf("%s: the link %s leads to %s", name, file, link)
			}
			if !declares(t, file, function) {
				t.Errorf("%s: %s has no function %q", name, file, function)
			}
			found++
		}
	}
	if found < 20 {
		t.Errorf("the pages name %d functions", found)
	}
}

// declares reports whether a file declares a function, or a method as TYPE.METHOD.
func declares(t *testing.T, file, function string) bool {
	t.Helper()
	f, err := parser.ParseFile(gotoken.NewFileSet(), filepath.Join(harness.Repo, file), nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range f.Decls {
		d, ok := d.(*ast.FuncDecl)
		if !ok {
			continue
		}
		name := d.Name.Name
		if d.Recv != nil {
			of := d.Recv.List[0].Type
			if star, ok := of.(*ast.StarExpr); ok {
				of = star.X
			}
			if id, ok := of.(*ast.Ident); ok {
				name = id.Name + "." + name
			}
		}
		if name == function {
			return true
		}
	}
	return false
}
