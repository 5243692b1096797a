package docs

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"go/parser"
	gotoken "go/token"
	"io"
	"io/fs"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// TestDocsLinks follows the links of each page, to files and to headings.
func TestDocsLinks(t *testing.T) {
	t.Parallel()
	harness.CheckLinks(t, harness.Repo, pages(t))
}

// TestDocsLinksOfPackages follows the links of the pages as packages and archives have them.
func TestDocsLinksOfPackages(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	harness.Output(t, exec.Command(filepath.Join(harness.Repo, "scripts/copy-docs.sh"), dir))
	harness.CheckLinks(t, dir, harness.PagesBelow(t, dir))
}

// TestDocsBlocks has the program that a configuration is for read it, and bash
// each command. Commands that nothing runs need a reason, so that new ones are run.
func TestDocsBlocks(t *testing.T) {
	t.Parallel()
	for name, p := range pages(t) {
		t.Run(filepath.Base(name), func(t *testing.T) {
			t.Parallel()
			script := harness.Command(t, "bash", "-n")
			script.Stdin = strings.NewReader(p.Script())
			if out, err := script.CombinedOutput(); err != nil {
				t.Errorf("bash: %v\n%s", err, out)
			}
			for _, b := range p.Blocks {
				switch {
				case b.Verb == "skip", b.Language == "text", b.Language == "mermaid":
				case b.Commands():
					if !runsInTests[name] {
						t.Errorf("%s:%d: these commands are not run: have a test run the page, or say why not by <!-- test: skip REASON -->", name, b.Line)
					}
				case fipstest.Is(fipstest.TPM) && strings.Contains(b.Text, `"tpm"`):
				default:
					if err := checkConfig(t, b); err != nil {
						t.Errorf("%s:%d: %v", name, b.Line, err)
					}
				}
			}
		})
	}
}

// TestDocsNamedTests requires that the tests exist that the pages name.
func TestDocsNamedTests(t *testing.T) {
	t.Parallel()
	exist := map[string]bool{}
	err := filepath.WalkDir(harness.Repo, func(name string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.HasPrefix(d.Name(), ".") {
			return fs.SkipDir
		}
		if err != nil || !strings.HasSuffix(name, "_test.go") {
			return err
		}
		for _, m := range regexp.MustCompile(`(?m)^func (Test\w+)\(`).FindAllStringSubmatch(harness.Read(t, name), -1) {
			exist[m[1]] = true
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for name := range pages(t) {
		// A pattern, as in -run '^TestDocs', names no single test.
		for _, m := range regexp.MustCompile(`(?:^|[^\w^])(Test[A-Z]\w+)`).FindAllStringSubmatch(harness.Read(t, filepath.Join(harness.Repo, name)), -1) {
			if !exist[m[1]] {
				t.Errorf("%s: there is no %s", name, m[1])
			}
		}
	}
}

// TestDocsWidth requires that prose fits into 100 columns, except tables, code,
// comments and links.
func TestDocsWidth(t *testing.T) {
	t.Parallel()
	const columns = 100
	unbreakable := regexp.MustCompile("^\\s*(\\||<!--|\\S*\\]\\(\\S+$|`[^`]+`\\S*$)")
	for name := range pages(t) {
		code := false
		for i, line := range strings.Split(harness.Read(t, filepath.Join(harness.Repo, name)), "\n") {
			if strings.HasPrefix(strings.TrimSpace(line), "```") {
				code = !code
			}
			if !code && utf8.RuneCountInString(line) > columns && !unbreakable.MatchString(line) {
				t.Errorf("%s:%d: %d columns, more than %d", name, i+1, utf8.RuneCountInString(line), columns)
			}
		}
	}
}

// configPrograms are the programs that configurations are for, by the name of the
// file.
var configPrograms = map[string]string{
	"pilot.toml": "pilot", "copilot.toml": "copilot", "policy.toml": "policy", "prometheus.yml": "prometheus",
}

// namedFile is a file that a configuration names. The programs read it when they start.
var namedFile = regexp.MustCompile(`"(/etc|/run|/var/run)/[^"]*"`)

// checkConfig has a block read by the program that it is for. The files that it names
// are made, below a directory of the test's.
func checkConfig(t *testing.T, b harness.Block) error {
	t.Helper()
	dir := harness.TempDir(t)
	program := b.Arg
	if b.Verb == "file" {
		program = configPrograms[path.Base(b.Arg)]
	}
	text := b.Text
	if slices.Contains([]string{"pilot", "copilot", "policy"}, program) {
		harness.Output(t, harness.Command(t, "copilot", "init", "--config-dir", dir+"/ca", "--dir", dir, "--host", "localhost", "--trust-domain", "example.com"))
		harness.Output(t, harness.Command(t, "copilot", "keys", "create", "--config", "/dev/null", "--dir", dir, "other"))
		text = namedFile.ReplaceAllStringFunc(text, func(quoted string) string {
			name := dir + strings.Trim(quoted, `"`)
			content := "1234\n"
			if strings.HasSuffix(name, "-key.pem") {
				content = harness.Read(t, dir+"/ca/server-key.pem")
			} else if ext := path.Ext(name); ext == ".pem" || ext == ".crt" {
				content = harness.Read(t, dir+"/ca/server.pem")
			}
			return strconv.Quote(harness.Write(t, name, content))
		})
	}
	file := harness.Write(t, filepath.Join(dir, "configuration"), text)
	switch program {
	case "pilot":
		// It reads its settings before the request, which is empty.
		out, _ := harness.Command(t, "pilot", "keyprovider", "--config", file).CombinedOutput()
		if !strings.Contains(string(out), "standard input has to be a request") {
			return errors.New(string(out))
		}
		return nil
	case "copilot":
		list := []string{"keys", "list", "--config", file, "--dir", dir, "--database", "", "--audit-log", "", "--policy", ""}
		if rest, _, found := strings.Cut(text, "\n[master-key]"); found {
			// It is read, and then the file of this store is in its way.
			harness.ExpectFailure(t, harness.Command(t, "copilot", list...), "copilot.toml has [master-key], and "+dir+"/master.key exists")
			harness.Write(t, file, rest)
		}
		return succeeds(harness.Command(t, "copilot", list...))
	case "policy":
		conf := harness.Write(t, dir+"/issuers", `
[issuers]
cluster = { url = "https://localhost", audience = "copilot" }
github = { url = "https://token.actions.githubusercontent.com", audience = "copilot" }
gitlab = { url = "https://gitlab.com", audience = "copilot" }
`)
		// It warns of rules that nobody should copy.
		out, err := harness.Command(t, "copilot", "policy", "check", "--config", conf, "--policy", file).CombinedOutput()
		if err != nil || bytes.Contains(out, []byte("warning")) {
			return errors.New(string(out))
		}
		return nil
	case "github-workflow":
		return checkWorkflow(t, b.Text)
	case "gitlab-ci":
		return checkGitLab(t, b.Text)
	case "prometheus":
		return succeeds(harness.Command(t, "promtool", "check", "config", "--syntax-only", file))
	case "containerd 2", "containerd 3", "containerd":
		if version := strings.TrimPrefix(program, "containerd"); version != "" {
			harness.Write(t, file, "version ="+version+"\n"+b.Text)
		}
		out, err := harness.Command(t, "containerd", "--config", file, "config", "dump").CombinedOutput()
		if err == nil && strings.Contains(string(out), "unknown key") {
			err = errors.New(string(out))
		}
		return err
	}
	switch b.Language {
	case "json":
		var any any
		return json.Unmarshal([]byte(b.Text), &any)
	case "hcl":
		return succeeds(harness.Command(t, "bao", "policy", "fmt", file))
	case "xml":
		d := xml.NewDecoder(strings.NewReader(b.Text))
		for {
			if _, err := d.Token(); err == io.EOF {
				return nil
			} else if err != nil {
				return err
			}
		}
	case "go":
		f, err := parser.ParseFile(gotoken.NewFileSet(), "", "package p\n"+b.Text, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, i := range f.Imports {
			name, _ := strconv.Unquote(i.Path.Value)
			list := harness.Command(t, "go", "list", name)
			list.Dir = harness.Repo
			err = errors.Join(err, succeeds(list))
		}
		return err
	}
	return errors.New("say what it is for, by <!-- test: config PROGRAM --> or <!-- test: file PATH -->")
}

// succeeds runs a command and returns what it says if it fails.
func succeeds(cmd *exec.Cmd) error {
	out, err := cmd.CombinedOutput()
	if err != nil {
		return errors.New(string(bytes.TrimSpace(out)))
	}
	return nil
}

// runsInTests are the pages whose commands TestPackageDocs runs.
var runsInTests = map[string]bool{"README.md": true, "docs/node.md": true, "docs/copilot.md": true, "docs/encrypting.md": true, "docs/observability.md": true, "docs/kms.md": true, "docs/containerd.md": true, "docs/rotate.md": true, "docs/podman.md": true, "docs/keys.md": true}
