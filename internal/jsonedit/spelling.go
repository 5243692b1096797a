package jsonedit

import (
	"bytes"
	"fmt"
)

// Spelling returns which characters of a JSON string are escaped, and how: one
// character for each, u or U for \u with lower or upper case letters, \ for a
// backslash and the character itself, and . for one that is not escaped. It reveals
// nothing of the string except its length. A string that [QuoteAs] would not write
// the same way is an error.
func Spelling(text []byte) (string, error) {
	var mask []byte
	for i := 1; i < len(text)-1; i++ {
		switch {
		case text[i] != '\\':
			mask = append(mask, '.')
		case text[i+1] != 'u':
			mask = append(mask, '\\')
			i++
		case i+6 > len(text):
			return "", fmt.Errorf("%.200s is not a JSON string", text)
		default:
			kind := byte('u')
			if bytes.ContainsAny(text[i+2:i+6], "ABCDEF") {
				kind = 'U'
			}
			mask = append(mask, kind)
			i += 5
		}
	}
	if string(QuoteAs(Unquote(text), string(mask))) != string(text) {
		return "", fmt.Errorf("the escapes of %.200s can't be restored", text)
	}
	return string(mask), nil
}

// QuoteLike returns s as a JSON string with escapes where the JSON string had has
// them, or without if they do not fit.
func QuoteLike(had []byte, s string) []byte {
	mask, err := Spelling(had)
	if err != nil {
		return Quote(s)
	}
	return QuoteAs(s, mask)
}

// QuoteAs returns s as a JSON string with escapes as [Spelling] returns them, or without
// if they do not fit.
func QuoteAs(s, mask string) []byte {
	if len(s) != len(mask) {
		return Quote(s)
	}
	out := []byte{'"'}
	for i := range len(s) {
		switch mask[i] {
		case 'u':
			out = fmt.Appendf(out, `\u%04x`, s[i])
		case 'U':
			out = fmt.Appendf(out, `\u%04X`, s[i])
		case '\\':
			out = append(out, '\\', s[i])
		default:
			out = append(out, s[i])
		}
	}
	if out = append(out, '"'); Unquote(out) != s {
		return Quote(s)
	}
	return out
}
