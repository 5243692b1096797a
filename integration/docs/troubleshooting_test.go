package docs

import (
	"encoding/json"
	"go/ast"
	"go/parser"
	gotoken "go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

const troubleshooting = "docs/troubleshooting.md"

// TestDocsTroubleshootingSteps requires that the page has each step of the doctor in
// a heading.
func TestDocsTroubleshootingSteps(t *testing.T) {
	t.Parallel()
	var headings string
	for line := range strings.Lines(harness.Read(t, filepath.Join(harness.Repo, troubleshooting))) {
		if strings.HasPrefix(line, "### ") {
			headings += line
		}
	}
	steps := constants(t, "node", regexp.MustCompile(`^Step[A-Z]`))
	if len(steps) < 15 {
		t.Fatalf("steps of the doctor: %q", steps)
	}
	for _, step := range steps {
		if !strings.Contains(headings, "`"+step+"`") {
			t.Errorf("%s has no heading for the doctor's step %s", troubleshooting, step)
		}
	}
}

// TestDocsTroubleshootingFindings requires that a line of the page has most of the
// words of each finding of the doctor, so that a new finding is missed and a
// reworded one is not.
func TestDocsTroubleshootingFindings(t *testing.T) {
	t.Parallel()
	findings := doctorFindings(t)
	if len(findings) < 50 {
		t.Fatalf("findings of the doctor: %q", findings)
	}
	requireLines(t, findings)
}

// TestDocsTroubleshootingErrors requires the same of the errors that our packages
// export, which users meet when a pull fails.
func TestDocsTroubleshootingErrors(t *testing.T) {
	t.Parallel()
	var texts []string
	for _, dir := range []string{"copilot/client", "keyprovider", "plugin", "processor"} {
		for _, file := range sources(t, dir) {
			ast.Inspect(file, func(n ast.Node) bool {
				spec, ok := n.(*ast.ValueSpec)
				if !ok || !regexp.MustCompile(`^[eE]rr[A-Z]`).MatchString(spec.Names[0].Name) {
					return true
				}
				ast.Inspect(spec, func(n ast.Node) bool {
					if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == gotoken.STRING {
						text, _ := strconv.Unquote(lit.Value)
						texts = append(texts, text)
					}
					return true
				})
				return true
			})
		}
	}
	if len(texts) < 15 {
		t.Fatalf("errors: %q", texts)
	}
	requireLines(t, texts)
}

// requireLines requires that a line of the page's tables has most of the words of
// each text.
func requireLines(t *testing.T, texts []string) {
	t.Helper()
	var lines []map[string]bool
	for line := range strings.Lines(harness.Read(t, filepath.Join(harness.Repo, troubleshooting))) {
		if strings.HasPrefix(line, "| ") {
			lines = append(lines, words(line))
		}
	}
	for _, text := range texts {
		most, all := 0, words(text)
		for _, line := range lines {
			n := 0
			for w := range all {
				if line[w] {
					n++
				}
			}
			most = max(most, n)
		}
		if most*10 < len(all)*6 {
			t.Errorf("%s has no line for %q", troubleshooting, text)
		}
	}
}

// TestDocsTroubleshootingProblems requires that the page has each problem type of
// copilot's API, and each status of its errors.
func TestDocsTroubleshootingProblems(t *testing.T) {
	t.Parallel()
	page := harness.Read(t, filepath.Join(harness.Repo, troubleshooting))
	types := constants(t, "internal/wireformat", regexp.MustCompile(`^Problem[A-Z]`))
	if len(types) < 4 {
		t.Fatalf("problem types: %q", types)
	}
	for _, problem := range types {
		if !strings.Contains(page, "`"+problem+"`") {
			t.Errorf("%s lacks the problem type %s", troubleshooting, problem)
		}
	}
	var api struct {
		Paths map[string]map[string]json.RawMessage `json:"paths"`
	}
	if err := json.Unmarshal([]byte(harness.Read(t, filepath.Join(harness.Repo, "copilot/server/openapi.json"))), &api); err != nil {
		t.Fatal(err)
	}
	statuses := map[string]bool{}
	for _, methods := range api.Paths {
		for _, operation := range methods {
			var o struct {
				Responses map[string]any `json:"responses"`
			}
			if json.Unmarshal(operation, &o) != nil {
				continue // the parameters of all methods
			}
			for status := range o.Responses {
				if status[0] == '4' || status[0] == '5' {
					statuses[status] = true
				}
			}
		}
	}
	if len(statuses) < 4 {
		t.Fatalf("statuses of errors: %v", statuses)
	}
	for status := range statuses {
		if !strings.Contains(page, "| "+status+" |") {
			t.Errorf("%s lacks copilot's status %s", troubleshooting, status)
		}
	}
}

// sources parses the Go files below a directory, without tests.
func sources(t *testing.T, dir string) map[string]*ast.File {
	t.Helper()
	files := map[string]*ast.File{}
	err := filepath.WalkDir(filepath.Join(harness.Repo, dir), func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			return err
		}
		files[name], err = parser.ParseFile(gotoken.NewFileSet(), name, nil, 0)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// constants returns the values of a directory's string constants with such names.
func constants(t *testing.T, dir string, name *regexp.Regexp) (values []string) {
	t.Helper()
	for _, file := range sources(t, dir) {
		ast.Inspect(file, func(n ast.Node) bool {
			if spec, ok := n.(*ast.ValueSpec); ok && name.MatchString(spec.Names[0].Name) && len(spec.Values) == 1 {
				if lit, ok := spec.Values[0].(*ast.BasicLit); ok && lit.Kind == gotoken.STRING {
					value, _ := strconv.Unquote(lit.Value)
					values = append(values, value)
				}
			}
			return true
		})
	}
	return values
}

// doctorFindings returns the texts in the doctor's sources that say what is wrong:
// all of at least five words but good results, and what fixes something.
func doctorFindings(t *testing.T) (findings []string) {
	t.Helper()
	fixes := regexp.MustCompile(`^(add|onBroker|inOrder|passed)$`)
	for name, file := range sources(t, "node") {
		if !strings.Contains(name, "doctor") {
			continue
		}
		var find func(n ast.Node) bool
		find = func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.CallExpr:
				called := ""
				switch f := n.Fun.(type) {
				case *ast.Ident:
					called = f.Name
				case *ast.SelectorExpr:
					if from, ok := f.X.(*ast.Ident); ok && from.Name == "strings" {
						return false
					}
				}
				switch {
				case called == "failed" || called == "fail": // the others are commands
					ast.Inspect(n.Args[0], find)
					return false
				case called == "append" && len(n.Args) > 1:
					if to, ok := n.Args[0].(*ast.Ident); !ok || to.Name == "mend" || to.Name == "fix" {
						return false
					}
				case fixes.MatchString(called):
					return false
				}
			case *ast.CompositeLit: // lists of commands
				if array, ok := n.Type.(*ast.ArrayType); ok {
					if of, ok := array.Elt.(*ast.Ident); ok && of.Name == "string" {
						for _, e := range n.Elts {
							if _, literal := e.(*ast.BasicLit); !literal {
								ast.Inspect(e, find)
							}
						}
						return false
					}
				}
			case *ast.GenDecl:
				return n.Tok != gotoken.CONST && n.Tok != gotoken.IMPORT
			case *ast.BasicLit:
				if text, err := strconv.Unquote(n.Value); err == nil && n.Kind == gotoken.STRING && len(words(text)) >= 4 {
					findings = append(findings, text)
				}
			}
			return true
		}
		ast.Inspect(file, find)
	}
	return findings
}

// words returns the words of a text that say something.
func words(text string) map[string]bool {
	all := map[string]bool{}
	for _, w := range regexp.MustCompile(`[A-Za-z][A-Za-z'_-]{2,}`).FindAllString(regexp.MustCompile(`%[#+]?[a-zA-Z]`).ReplaceAllString(text, " "), -1) {
		all[strings.ToLower(w)] = true
	}
	return all
}
