package wireformat

import (
	"bytes"
	"encoding/base64"
	"strconv"
)

// parseQuick reads an annotation of method A256GCMKW for a version of a KEK, in the very
// bytes that encoding/json writes. It reports false for other texts, which may be valid too.
// A node reads one for each layer, and encoding/json takes longer than decrypting it.
func parseQuick(b []byte) (Annotation, bool) {
	a := Annotation{Method: MethodA256GCMKW}
	kek, b, isKEK := cut(b, `{"method":"`+MethodA256GCMKW+`","kekId":"`, '"')
	version, b, isVersion := cut(b, `,"kekVersion":`, ',')
	iv, b, isIV := cut(b, `"iv":"`, '"')
	key, b, isKey := cut(b, `,"wrappedKey":"`, '"')
	if !isKEK || !isVersion || !isIV || !isKey || string(b) != "}" {
		return a, false
	}
	a.KEKID = string(kek)
	var err error
	if a.KEKVersion, err = strconv.Atoi(string(version)); err != nil || strconv.Itoa(a.KEKVersion) != string(version) {
		return a, false
	}
	if a.IV, err = base64.StdEncoding.AppendDecode(nil, iv); err != nil {
		return a, false
	}
	a.WrappedKey, err = base64.StdEncoding.AppendDecode(nil, key)
	return a, err == nil
}

// cut returns what is between a prefix of b and the next byte end, and what follows that. It
// reports false if there is no such text, or if it is not verbatim.
func cut(b []byte, prefix string, end byte) (text, rest []byte, ok bool) {
	b, ok = bytes.CutPrefix(b, []byte(prefix))
	text, rest, found := bytes.Cut(b, []byte{end})
	return text, rest, ok && found && len(text) > 0 && isVerbatim(text)
}

// isVerbatim reports whether encoding/json writes a string as it is.
func isVerbatim[T string | []byte](s T) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			return false
		}
	}
	return true
}
