package host

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"
)

// ExecStart returns the command that systemd starts a service with, after the unit's
// drop-ins and with variables of Environment= and EnvironmentFile= replaced; no words
// if there is no command. If systemd would not run the command, or only systemd can
// expand it, the error says why, and the words before that point are returned.
func (h Host) ExecStart(service string) ([]string, error) {
	var command, from string
	env := environment{}
	var files []string
	for _, file := range h.UnitFiles(service) {
		for _, s := range h.unitSettings(file) {
			if s.Section != "Service" {
				continue
			}
			s.Value = strings.ReplaceAll(s.Value, "\\\n", " ")
			switch s.Name {
			case "ExecStart":
				command, from = s.Value, file // an empty one takes back those before it
			case "Environment":
				if err := env.set(s.Value); err != nil {
					return nil, &Conflict{file, fmt.Sprintf("Environment=%s: %s", s.Value, err), "correct it"}
				}
			case "EnvironmentFile":
				if files = append(files, s.Value); s.Value == "" {
					files = nil
				}
			}
		}
	}
	for _, file := range files {
		env.read(h, file)
	}
	words, err := commandWords(command, env)
	if err != nil {
		err = &Conflict{from, fmt.Sprintf("ExecStart=%s: %s", command, err), "name the program and its file with --containerd-binary and --containerd-config"}
	}
	return words, err
}

// environment is what a unit gives its processes.
type environment map[string]value

// value is a variable's, or why only systemd knows it.
type value struct {
	text string
	err  error
}

// set adds an Environment= setting's assignments.
func (e environment) set(assignments string) error {
	if assignments == "" {
		clear(e) // takes back those before it
		return nil
	}
	words, err := splitWords(assignments)
	for _, w := range words {
		if name, v, ok := strings.Cut(w.text, "="); ok {
			text, err := expandSpecifiers(v)
			e[name] = value{text, err}
		}
	}
	return err
}

// read adds the assignments of an EnvironmentFile=. A missing file adds none: systemd
// reports it if the file is required.
func (e environment) read(h Host, file string) {
	paths, _ := h.Glob(strings.TrimPrefix(file, "-"))
	for _, path := range paths {
		text, err := h.ReadFile(path)
		if err != nil {
			continue
		}
		joined := strings.ReplaceAll(string(text), "\\\n", "")
		for line := range strings.Lines(joined) {
			name, text, ok := strings.Cut(strings.TrimSpace(line), "=")
			if !ok || strings.HasPrefix(name, "#") || strings.HasPrefix(name, ";") {
				continue
			}
			e[strings.TrimSpace(name)] = value{text: unquoteFileValue(strings.TrimSpace(text))}
		}
	}
}

// unquoteFileValue returns a value of an environment file without its quotes.
func unquoteFileValue(value string) string {
	var b strings.Builder
	var quote rune
	escaped := false
	for _, r := range value {
		switch {
		case escaped:
			if quote == '"' && !strings.ContainsRune("\"\\`$", r) {
				b.WriteByte('\\')
			}
			b.WriteRune(r)
			escaped = false
		case r == '\\' && quote != '\'':
			escaped = true
		case r == quote:
			quote = 0
		case quote == 0 && (r == '"' || r == '\''):
			quote = r
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

// word is a word of a command, before variables are replaced.
type word struct {
	text   string
	quoted bool // in part or as a whole
}

// commandWords returns the words of an ExecStart= line, whose first is the program,
// as systemd.service(5) describes, "COMMAND LINES".
func commandWords(command string, env environment) (words []string, err error) {
	split, err := splitWords(command)
	for i, w := range split {
		if w.text == ";" && !w.quoted {
			return words, errors.New("it runs more than one command")
		}
		if i == 0 {
			w.text = strings.TrimLeft(w.text, "@-:+!|")
		}
		text, specErr := expandSpecifiers(w.text)
		if specErr != nil {
			return words, specErr
		}
		split[i].text = text
		words = append(words, text)
	}
	if err != nil || len(split) == 0 {
		return words, err
	}
	first, _ := splitWords(command)
	prefix := first[0].text[:len(first[0].text)-len(strings.TrimLeft(first[0].text, "@-:+!|"))]
	expanded := words[:1:1]
	args := split[1:]
	if strings.Contains(prefix, "@") && len(args) > 0 {
		args = args[1:] // the name that the process gets
	}
	for _, w := range args {
		switch {
		case strings.Contains(prefix, ":"):
			expanded = append(expanded, w.text)
		case wholeVariable.MatchString(w.text):
			// Split at spaces, and nothing if it is not set.
			v := env[w.text[1:]]
			list, err := splitWords(v.text)
			if err = errors.Join(v.err, err); err != nil {
				return expanded, err
			}
			for _, part := range list {
				expanded = append(expanded, part.text)
			}
		default:
			var err error
			text := variable.ReplaceAllStringFunc(w.text, func(s string) string {
				if s == "$$" {
					return "$"
				}
				v := env[s[2:len(s)-1]]
				err = errors.Join(err, v.err)
				return v.text
			})
			if err != nil {
				return expanded, err
			}
			expanded = append(expanded, text)
		}
	}
	return expanded, nil
}

var (
	wholeVariable = regexp.MustCompile(`^\$[A-Za-z_][A-Za-z0-9_]*$`)
	variable      = regexp.MustCompile(`\$\$|\$\{[A-Za-z_][A-Za-z0-9_]*\}`)
)

// expandSpecifiers replaces the specifiers that are the same for all units. Any other
// is an error.
func expandSpecifiers(s string) (string, error) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '%' {
			b.WriteByte(s[i])
			continue
		}
		if i++; i == len(s) {
			return "", errors.New("it ends with %")
		}
		known, ok := map[byte]string{'%': "%", 't': "/run", 'S': "/var/lib", 'C': "/var/cache", 'L': "/var/log", 'E': "/etc", 'T': "/tmp", 'V': "/var/tmp", 'h': "/root", 'u': "root", 'U': "0"}[s[i]]
		if !ok {
			return "", fmt.Errorf("only systemd can expand %%%c", s[i])
		}
		b.WriteString(known)
	}
	return b.String(), nil
}

// splitWords splits a line at spaces that are neither quoted nor escaped, and
// takes quotes and escapes away, as systemd does: see systemd.syntax(7), "QUOTING".
func splitWords(line string) (words []word, err error) {
	for {
		line = strings.TrimLeft(line, " \t\n\r")
		if line == "" {
			return words, nil
		}
		var b strings.Builder
		var quote byte
		w := word{}
	scan:
		for len(line) > 0 {
			c := line[0]
			switch {
			case c == '\\':
				text, rest, err := unescape(line[1:])
				if err != nil {
					return words, err
				}
				b.WriteString(text)
				line = rest
				continue
			case quote != 0 && c == quote:
				quote = 0
			case quote == 0 && (c == '"' || c == '\''):
				quote, w.quoted = c, true
			case quote == 0 && strings.IndexByte(" \t\n\r", c) >= 0:
				break scan
			default:
				b.WriteByte(c)
			}
			line = line[1:]
		}
		if quote != 0 {
			return words, fmt.Errorf("the quote %c is not closed", quote)
		}
		w.text = b.String()
		words = append(words, w)
	}
}

// unescape returns the text of the escape that s begins with, without its backslash,
// and the rest of s.
func unescape(s string) (text, rest string, err error) {
	if s == "" {
		return "", "", errors.New("it ends with a backslash")
	}
	if i := strings.IndexByte(`abfnrtv\"'s; `, s[0]); i >= 0 {
		return "\a\b\f\n\r\t\v\\\"' ; "[i : i+1], s[1:], nil
	}
	for _, form := range []struct {
		prefix       string
		digits, base int
	}{{"x", 2, 16}, {"u", 4, 16}, {"U", 8, 16}, {"", 3, 8}} {
		if digits, ok := strings.CutPrefix(s, form.prefix); ok && len(digits) >= form.digits {
			n, err := strconv.ParseUint(digits[:form.digits], form.base, 32)
			if err != nil || n == 0 {
				continue
			}
			if form.digits > 3 {
				return string(utf8.AppendRune(nil, rune(n))), digits[form.digits:], nil
			}
			return string([]byte{byte(n)}), digits[form.digits:], nil
		}
	}
	return "", "", fmt.Errorf(`\%c is not an escape`, s[0])
}
