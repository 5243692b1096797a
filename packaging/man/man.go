// Package man writes the programs' manual pages out of their command lines, so
// that they say what --help says. It is in no program: each has it under the
// build tag man.
package man

import (
	"bytes"
	"fmt"
	"io"
	"regexp"
	"strings"
)

// Page is the manual page of a program.
type Page struct {
	Name, Version, Summary, Description string
	Synopsis                            string // of a program without commands
	Commands                            []Command
}

// Command is a command of a program, named with those above it.
type Command struct {
	Name, Arguments, Summary, Description string
	Options                               []Option
}

// Option is what a command line or a configuration file can set.
type Option struct {
	Name, Value, Usage, Default, Variable string
}

// manyCommands have an option of the same meaning: it is described once.
const manyCommands = 3

// Write writes the page in section 8, without what is written by hand after it.
func (p *Page) Write(w io.Writer) error {
	var b bytes.Buffer
	fmt.Fprintf(&b, ".TH %s 8 \"\" \"pilot %s\" \"\"\n.nh\n", strings.ToUpper(escape(p.Name)), escape(p.Version))
	fmt.Fprintf(&b, ".SH NAME\n%s \\- %s\n", escape(p.Name), escape(p.Summary))
	b.WriteString(".SH SYNOPSIS\n")
	for line := range strings.Lines(p.Synopsis) {
		fmt.Fprintf(&b, "%s\n.br\n", escape(strings.TrimSpace(line)))
	}
	for _, c := range p.Commands {
		fmt.Fprintf(&b, ".B %s\n", escape(p.Name+" "+c.Name))
		if len(c.Options) > 0 {
			b.WriteString("[\\fIOPTION\\fR]...\\&\n")
		}
		if c.Arguments != "" {
			b.WriteString(escape(c.Arguments) + "\\&\n")
		}
		b.WriteString(".br\n")
	}
	b.WriteString(".SH DESCRIPTION\n")
	prose(&b, p.Description)

	count := make(map[Option]int)
	var common []Option
	for _, c := range p.Commands {
		for _, o := range c.Options {
			if count[o]++; count[o] == manyCommands {
				common = append(common, o)
			}
		}
	}
	if len(p.Commands) > 0 {
		b.WriteString(".SH COMMANDS\n")
	}
	for _, c := range p.Commands {
		fmt.Fprintf(&b, ".SS %s\n%s\n", escape(c.Name), inline(strings.ToUpper(c.Summary[:1])+c.Summary[1:]+"."))
		if c.Description != "" {
			b.WriteString(".PP\n")
			prose(&b, c.Description)
		}
		var elsewhere []string
		for _, o := range c.Options {
			if count[o] < manyCommands {
				o.write(&b, dashes(o.Name))
			} else {
				elsewhere = append(elsewhere, `\fB`+escape(dashes(o.Name)+o.Name)+`\fR`)
			}
		}
		if len(elsewhere) == len(common) && len(common) > 0 {
			b.WriteString(".PP\nAnd the common options.\n")
		} else if len(elsewhere) > 0 {
			fmt.Fprintf(&b, ".PP\nOf the common options: %s.\n", strings.Join(elsewhere, ", "))
		}
	}
	if len(common) > 0 {
		b.WriteString(".SH COMMON OPTIONS\n")
		for _, o := range common {
			o.write(&b, dashes(o.Name))
		}
	}
	_, err := w.Write(b.Bytes())
	return err
}

// WriteSettings writes options as settings of a configuration file.
func WriteSettings(w io.Writer, options []Option) error {
	var b bytes.Buffer
	for _, o := range options {
		o.write(&b, "")
	}
	_, err := w.Write(b.Bytes())
	return err
}

func dashes(name string) string {
	if len(name) == 1 {
		return "-"
	}
	return "--"
}

func (o Option) write(b *bytes.Buffer, dashes string) {
	fmt.Fprintf(b, ".TP\n\\fB%s\\fR", escape(dashes+o.Name))
	if o.Value != "" {
		fmt.Fprintf(b, " \\fI%s\\fR", escape(o.Value))
	}
	usage := o.Usage
	if o.Default != "" {
		usage += "; default: " + o.Default
	}
	if o.Variable != "" {
		usage += "; or $" + o.Variable
	}
	fmt.Fprintf(b, "\n%s\n", protect(inline(usage)))
}

// prose writes text as --help has it: paragraphs, and examples that are
// indented by three spaces.
func prose(b *bytes.Buffer, text string) {
	example, blank := false, false
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		if line == "" {
			blank = true
			continue
		}
		code, indented := strings.CutPrefix(line, "   ")
		switch {
		case indented && !example:
			b.WriteString(".PP\n.RS 4\n.EX\n")
		case !indented && example:
			b.WriteString(".EE\n.RE\n.PP\n")
		case blank && indented:
			b.WriteString("\n")
		case blank:
			b.WriteString(".PP\n")
		}
		example, blank = indented, false
		if example {
			b.WriteString(protect(escape(code)) + "\n")
		} else {
			b.WriteString(protect(inline(line)) + "\n")
		}
	}
	if example {
		b.WriteString(".EE\n.RE\n")
	}
}

var (
	escaper  = strings.NewReplacer(`\`, `\e`, "-", `\-`, "'", `\(aq`, "`", `\(ga`, "^", `\(ha`, "~", `\(ti`)
	emphasis = regexp.MustCompile("`([^`]*)`")
	hyphen   = regexp.MustCompile(`(\pL)\\-(\pL)`)
)

// escape escapes text that is to be typed.
func escape(s string) string { return escaper.Replace(s) }

// inline escapes a line of prose. What stands in backticks is a value's name.
func inline(s string) string {
	var b strings.Builder
	at := 0
	for _, m := range emphasis.FindAllStringSubmatchIndex(s, -1) {
		b.WriteString(escape(s[at:m[0]]) + `\fI` + escape(s[m[2]:m[3]]) + `\fR`)
		at = m[1]
	}
	b.WriteString(escape(s[at:]))
	return hyphen.ReplaceAllString(b.String(), "$1-$2")
}

// protect keeps a line from being taken for a request.
func protect(line string) string {
	if strings.HasPrefix(line, ".") {
		return `\&` + line
	}
	return line
}
