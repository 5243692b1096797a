package integration

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"go/parser"
	gotoken "go/token"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestDocsLinks follows the links of each page, to files and to headings.
func TestDocsLinks(t *testing.T) {
	t.Parallel()
	checkLinks(t, repo, pages(t))
}

// checkLinks follows the links of pages whose names are from dir.
func checkLinks(t *testing.T, dir string, all map[string]*page) {
	t.Helper()
	for name, p := range all {
		for _, link := range p.links {
			if strings.Contains(link, "://") {
				continue
			}
			file, anchor, _ := strings.Cut(link, "#")
			target := name
			if file != "" {
				target = filepath.Join(filepath.Dir(name), file)
			}
			if _, err := os.Stat(filepath.Join(dir, target)); err != nil {
				t.Errorf("%s: the link %s leads nowhere", name, link)
			} else if anchor != "" && (all[target] == nil || !slices.Contains(all[target].anchors, anchor)) {
				t.Errorf("%s: %s has no heading for the link %s", name, target, link)
			}
		}
	}
}

// TestDocsBlocks has the program that a configuration is for read it, and bash
// each command. Commands that nothing runs need a reason, so that new ones are run.
func TestDocsBlocks(t *testing.T) {
	t.Parallel()
	tests := map[string]bool{}
	files, _ := filepath.Glob(repo + "/integration/*_test.go")
	for _, file := range files {
		for _, m := range regexp.MustCompile(`(?m)^func (Test\w+)\(`).FindAllStringSubmatch(read(t, file), -1) {
			tests[m[1]] = true
		}
	}
	for name, p := range pages(t) {
		t.Run(filepath.Base(name), func(t *testing.T) {
			t.Parallel()
			script := command(t, "bash", "-n")
			script.Stdin = strings.NewReader(p.script())
			if out, err := script.CombinedOutput(); err != nil {
				t.Errorf("bash: %v\n%s", err, out)
			}
			for _, b := range p.blocks {
				switch {
				case b.verb == "skip":
					for _, test := range regexp.MustCompile(`Test\w+`).FindAllString(b.arg, -1) {
						if !tests[test] {
							t.Errorf("%s:%d: there is no %s", name, b.line, test)
						}
					}
				case b.language == "text":
				case b.commands():
					if !runsInTests[name] {
						t.Errorf("%s:%d: these commands are not run: have a test run the page, or say why not by <!-- test: skip REASON -->", name, b.line)
					}
				default:
					if err := checkConfig(t, b); err != nil {
						t.Errorf("%s:%d: %v", name, b.line, err)
					}
				}
			}
		})
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
func checkConfig(t *testing.T, b block) error {
	t.Helper()
	dir := tempDir(t)
	program := b.arg
	if b.verb == "file" {
		program = configPrograms[path.Base(b.arg)]
	}
	text := b.text
	if slices.Contains([]string{"pilot", "copilot", "policy"}, program) {
		output(t, command(t, "copilot", "init", "--config-dir", dir+"/ca", "--dir", dir, "--host", "localhost", "--trust-domain", "example.com"))
		output(t, command(t, "copilot", "keys", "create", "--config", "/dev/null", "--dir", dir, "other"))
		text = namedFile.ReplaceAllStringFunc(text, func(quoted string) string {
			name := dir + strings.Trim(quoted, `"`)
			content := "1234\n"
			if strings.HasSuffix(name, "-key.pem") {
				content = read(t, dir+"/ca/server-key.pem")
			} else if ext := path.Ext(name); ext == ".pem" || ext == ".crt" {
				content = read(t, dir+"/ca/server.pem")
			}
			return strconv.Quote(write(t, name, content))
		})
	}
	file := write(t, filepath.Join(dir, "configuration"), text)
	switch program {
	case "pilot":
		// It reads its settings before the request, which is empty.
		out, _ := command(t, "pilot", "keyprovider", "--config", file).CombinedOutput()
		if !strings.Contains(string(out), "standard input has to be a request") {
			return errors.New(string(out))
		}
		return nil
	case "copilot":
		return succeeds(command(t, "copilot", "keys", "list", "--config", file, "--dir", dir, "--database", "", "--audit-log", "", "--policy", ""))
	case "policy":
		conf := write(t, dir+"/issuers", "[issuers.cluster]\nurl = 'https://localhost'\naudience = 'copilot'\n")
		return succeeds(command(t, "copilot", "policy", "check", "--config", conf, "--policy", file))
	case "prometheus":
		return succeeds(command(t, "promtool", "check", "config", "--syntax-only", file))
	case "containerd 2", "containerd 3", "containerd":
		if version := strings.TrimPrefix(program, "containerd"); version != "" {
			write(t, file, "version ="+version+"\n"+b.text)
		}
		out, err := command(t, "containerd", "--config", file, "config", "dump").CombinedOutput()
		if err == nil && strings.Contains(string(out), "unknown key") {
			err = errors.New(string(out))
		}
		return err
	}
	switch b.language {
	case "json":
		var any any
		return json.Unmarshal([]byte(b.text), &any)
	case "hcl":
		return succeeds(command(t, "bao", "policy", "fmt", file))
	case "xml":
		d := xml.NewDecoder(strings.NewReader(b.text))
		for {
			if _, err := d.Token(); err == io.EOF {
				return nil
			} else if err != nil {
				return err
			}
		}
	case "go":
		f, err := parser.ParseFile(gotoken.NewFileSet(), "", "package p\n"+b.text, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, i := range f.Imports {
			name, _ := strconv.Unquote(i.Path.Value)
			list := command(t, "go", "list", name)
			list.Dir = repo
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
var runsInTests = map[string]bool{"README.md": true, "docs/node.md": true, "docs/copilot.md": true, "docs/encrypting.md": true, "docs/observability.md": true, "docs/kms.md": true, "docs/containerd.md": true}
