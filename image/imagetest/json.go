package imagetest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"unicode/utf8"
)

// object is a JSON object whose members stay in order.
type object []member

type member struct {
	key   string
	value any
}

// style is how a document is written.
type style int

const (
	compact style = iota
	indented
	odd // with white space and escapes where JSON allows them
)

// text writes a value as JSON.
func (g *generator) text(v any, s style) []byte {
	var b bytes.Buffer
	g.write(&b, v, s)
	switch s {
	case indented:
		var out bytes.Buffer
		if err := json.Indent(&out, b.Bytes(), "", "   "); err != nil {
			panic(err)
		}
		return out.Bytes()
	case odd:
		return append([]byte("\n "), append(b.Bytes(), "\n\n"...)...)
	}
	return b.Bytes()
}

func (g *generator) write(b *bytes.Buffer, v any, s style) {
	space := func() {
		if s == odd {
			b.WriteString([]string{"", "", " ", "\n\t", "  "}[g.IntN(5)])
		}
	}
	switch v := v.(type) {
	case object:
		b.WriteByte('{')
		for i, m := range v {
			if i > 0 {
				b.WriteByte(',')
			}
			space()
			g.write(b, m.key, compact)
			space()
			b.WriteByte(':')
			space()
			g.write(b, m.value, s)
			space()
		}
		b.WriteByte('}')
	case []object:
		b.WriteByte('[')
		for i, o := range v {
			if i > 0 {
				b.WriteByte(',')
			}
			space()
			g.write(b, o, s)
			space()
		}
		b.WriteByte(']')
	case string:
		if s == odd && g.chance(0.1) {
			b.WriteString(g.escaped(v))
			return
		}
		var text bytes.Buffer
		e := json.NewEncoder(&text)
		e.SetEscapeHTML(false)
		if err := e.Encode(v); err != nil {
			panic(err)
		}
		b.Write(bytes.TrimSuffix(text.Bytes(), []byte("\n")))
	case json.RawMessage:
		b.Write(v)
	default:
		text, err := json.Marshal(v)
		if err != nil {
			panic(err)
		}
		b.Write(text)
	}
}

// escaped writes a string with escapes that JSON does not need, as some tools do
// with slashes and plus signs.
func (g *generator) escaped(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for i, r := range s {
		switch {
		case r == '/' && g.chance(0.5):
			b.WriteString(`\/`)
		case r == '+' || i == 0 || r < ' ' || r == '"' || r == '\\':
			if r > 0xffff || r == utf8.RuneError {
				b.WriteRune(r)
				continue
			}
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}
