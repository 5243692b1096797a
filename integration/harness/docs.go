package harness

import (
	"fmt"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/yuin/goldmark"
	"github.com/yuin/goldmark/ast"
	"github.com/yuin/goldmark/extension"
	"github.com/yuin/goldmark/text"
)

// Page is a page of the documentation. Comments in it, which readers do not see,
// say how its blocks are tested:
//
//	<!-- test: skip REASON -->        the next block is not run
//	<!-- test: run COMMANDS -->       commands that readers don't need, such as copying a file to another machine
//	<!-- test: background SOCKET -->  the next block's command goes on running, and is ready once SOCKET is there
//	<!-- test: fails -->              the commands of the next block, a console, fail
//	<!-- test: prints -->             the next block, a text, is what the commands before it print
//	<!-- test: file PATH -->          the next block is written to that file
//	<!-- test: config PROGRAM -->     the next block is a configuration of that program's
//
// Blocks of commands need none: they are run, one after the other, in one shell.
type Page struct {
	Name    string // its file, in the repository
	lines   int
	Blocks  []Block
	links   []string
	anchors []string
}

// Block is a fenced block of code, or the commands of a comment.
type Block struct {
	Line      int    // its first line, after the fence
	fence     [2]int // the lines of its fences, or the first and last of its comment
	Language  string // "" means commands
	Text      string // without indentation
	Verb, Arg string // of the comment before it, if any
}

// directive is a comment that says how a block is tested.
var directive = regexp.MustCompile(`(?s)^\s*<!-- test: (skip|run|background|fails|prints|file|config)(?:\s+(.*?))?\s*-->\s*$`)

// languages are what a block may be, besides commands: configurations are read by
// the programs that they are for, and text is what a program prints.
var languages = []string{"text", "mermaid", "toml", "json", "yaml", "hcl", "ini", "xml", "go"}

func (b Block) Commands() bool { return slices.Contains([]string{"", "sh", "console"}, b.Language) }

// Runs reports whether the test runs the block's commands.
func (b Block) Runs() bool { return b.Commands() && b.Verb != "skip" && b.Verb != "file" }

// readPage parses a page.
func readPage(name string, source []byte) (*Page, error) {
	p := &Page{Name: name, lines: strings.Count(string(source), "\n")}
	lineOf := func(offset int) int { return 1 + strings.Count(string(source[:offset]), "\n") }
	seen := map[string]int{}
	err := ast.Walk(goldmark.New(goldmark.WithExtensions(extension.GFM)).Parser().Parse(text.NewReader(source)), func(n ast.Node, entering bool) (ast.WalkStatus, error) {
		if !entering {
			return ast.WalkContinue, nil
		}
		switch n := n.(type) {
		case *ast.FencedCodeBlock:
			if n.Lines().Len() == 0 {
				return 0, fmt.Errorf("%s: a block is empty", name)
			}
			first := lineOf(n.Lines().At(0).Start)
			b := Block{Line: first, fence: [2]int{first - 1, first + n.Lines().Len()}, Language: string(n.Language(source)), Text: string(n.Lines().Value(source))}
			if b.Language == "console" && len(b.Shown()) == 0 {
				return 0, fmt.Errorf("%s:%d: no line of this console begins with \"$ \"", name, first)
			}
			if !b.Commands() && !slices.Contains(languages, b.Language) {
				return 0, fmt.Errorf("%s:%d: the test knows no language %q: it is one of %q, or none for commands", name, b.fence[0], b.Language, languages)
			}
			p.Blocks = append(p.Blocks, b)
		case *ast.HTMLBlock:
			lines := n.Lines()
			all := string(lines.Value(source))
			first, count := lineOf(lines.At(0).Start), lines.Len()
			if n.HasClosure() {
				all += string(n.ClosureLine.Value(source))
				count++
			}
			if !strings.Contains(all, "test:") {
				break
			}
			b := Block{Line: first, fence: [2]int{first, first + count - 1}}
			m := directive.FindStringSubmatch(all)
			if m == nil || m[2] == "" && m[1] != "fails" && m[1] != "prints" {
				return 0, fmt.Errorf("%s:%d: the test does not understand %q", name, first, all)
			}
			b.Verb, b.Arg, b.Text = m[1], m[2], m[2]
			p.Blocks = append(p.Blocks, b)
		case *ast.Heading:
			anchor := strings.Map(func(r rune) rune { // as GitHub makes them
				switch {
				case r == ' ':
					return '-'
				case r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsDigit(r):
					return unicode.ToLower(r)
				}
				return -1
			}, string(plainText(n, source)))
			if seen[anchor]++; seen[anchor] > 1 {
				anchor = fmt.Sprintf("%s-%d", anchor, seen[anchor]-1)
			}
			p.anchors = append(p.anchors, anchor)
		case *ast.Link:
			p.links = append(p.links, string(n.Destination))
		case *ast.Image:
			p.links = append(p.links, string(n.Destination))
		}
		return ast.WalkContinue, nil
	})
	if err != nil {
		return nil, err
	}
	return p, p.attach()
}

// plainText returns the text of a node without its markup.
func plainText(n ast.Node, source []byte) (all []byte) {
	for c := n.FirstChild(); c != nil; c = c.NextSibling() {
		if t, ok := c.(*ast.Text); ok {
			all = append(all, t.Segment.Value(source)...)
		} else {
			all = append(all, plainText(c, source)...)
		}
	}
	return all
}

// attach gives each comment to the block that comes right after it.
func (p *Page) attach() error {
	var blocks []Block
	for i := 0; i < len(p.Blocks); i++ {
		b := p.Blocks[i]
		if b.Verb != "" && b.Verb != "run" {
			if i++; i == len(p.Blocks) || p.Blocks[i].Verb != "" || p.Blocks[i].fence[0] != b.fence[1]+1 {
				return fmt.Errorf("%s:%d: no block follows the comment on the next line", p.Name, b.fence[0])
			}
			next := p.Blocks[i]
			next.Verb, next.Arg = b.Verb, b.Arg
			if b.Verb == "fails" && next.Language != "console" {
				return fmt.Errorf("%s:%d: only a console shows how a command fails", p.Name, next.Line)
			}
			if b.Verb == "prints" && (next.Language != "text" || len(blocks) == 0 || blocks[len(blocks)-1].Language != "" || !blocks[len(blocks)-1].Runs()) {
				return fmt.Errorf("%s:%d: only a text after commands shows what they print", p.Name, next.Line)
			}
			b = next
		}
		blocks = append(blocks, b)
	}
	p.Blocks = blocks
	return nil
}

// PagesBelow returns README.md, docs/*.md and more pages of a directory, by their
// names from there.
func PagesBelow(t testing.TB, dir string, more ...string) map[string]*Page {
	t.Helper()
	files, err := filepath.Glob(dir + "/docs/*.md")
	if err != nil || len(files) < 15 {
		t.Fatalf("pages below %s: %q, %v", dir, files, err)
	}
	names := append(more, "README.md")
	for _, file := range files {
		names = append(names, "docs/"+filepath.Base(file))
	}
	all := map[string]*Page{}
	for _, name := range names {
		if all[name], err = readPage(name, []byte(Read(t, filepath.Join(dir, name)))); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// Script returns the page's commands as a script for bash. Each is on the line that
// it has in the page, so bash names the line of one that fails. What commands with
// output beside them print is written to files named by its line in /root/shown.
func (p *Page) Script() string {
	lines := make([]string, p.lines)
	put := func(line int, text string) { lines[line-1] = text } // from 1
	put(1, `set -eE -o pipefail; trap 'echo "`+p.Name+`:$LINENO: status $?: $BASH_COMMAND" >&2' ERR; mkdir -p /root/shown`)
	for i, b := range p.Blocks {
		text := strings.Split(strings.TrimSuffix(b.Text, "\n"), "\n")
		switch {
		case b.Verb == "run":
			for i, line := range text {
				put(b.fence[0]+i, line)
			}
			continue
		case b.Verb == "file":
			put(b.fence[0], fmt.Sprintf("mkdir -p %s; cat >%s <<'END OF FILE'", path.Dir(b.Arg), b.Arg))
			put(b.fence[1], "END OF FILE")
		case !b.Runs():
			continue
		case b.Verb == "background":
			put(b.fence[0], "{")
			put(b.fence[1], fmt.Sprintf("} & timeout 60 sh -c 'until test -S %s; do sleep 0.1; done'", b.Arg))
		case i+1 < len(p.Blocks) && p.Blocks[i+1].Verb == "prints":
			put(b.fence[0], fmt.Sprintf("exec {shown}> >(tee /root/shown/%d); tee=$!; {", p.Blocks[i+1].Line))
			put(b.fence[1], "} >&$shown 2>&1; exec {shown}>&-; wait $tee")
		case b.Language == "console":
			for _, s := range b.Shown() {
				end := fmt.Sprintf("; } 2>&1 | tee /root/shown/%d", s.Line)
				if b.Verb == "fails" {
					end += " && { echo 'this has to fail' >&2; exit 1; } || true"
				}
				for i, line := range s.command {
					put(s.Line+i, line)
				}
				lines[s.Line-1] = "{ " + lines[s.Line-1]
				lines[s.Line+len(s.command)-2] += end
			}
			continue
		}
		for i, line := range text {
			put(b.Line+i, line)
		}
	}
	return strings.Join(lines, "\n") + "\n"
}

// Shown is a command of a console block, and what the page says that it prints.
type Shown struct {
	Line    int
	command []string
	Output  string
}

// Shown returns the commands of a console block: the lines that begin with "$ ",
// and those that continue them.
func (b Block) Shown() (all []Shown) {
	more := false
	for i, line := range strings.Split(strings.TrimSuffix(b.Text, "\n"), "\n") {
		command, begins := strings.CutPrefix(line, "$ ")
		switch {
		case begins:
			all = append(all, Shown{Line: b.Line + i, command: []string{command}})
		case more:
			all[len(all)-1].command = append(all[len(all)-1].command, line)
		case len(all) > 0:
			all[len(all)-1].Output += line + "\n"
		}
		more = (begins || more) && strings.HasSuffix(line, `\`)
	}
	return all
}
