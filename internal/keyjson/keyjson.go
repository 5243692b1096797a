// Package keyjson reads and writes JSON that holds keys, and leaves no copies of
// them behind. The encoder of encoding/json keeps what it wrote in buffers for
// later use, and its Decoder keeps what it read.
package keyjson

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"slices"
)

// Member is a member of an object.
type Member struct {
	name string
	json []byte // of what is no key
	key  []byte
}

// Value is a member that holds no key. It panics if v has no JSON.
func Value(name string, v any) Member {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return Member{name: name, json: b}
}

// Raw is a member that is JSON already, and may hold keys.
func Raw(name string, b []byte) Member { return Member{name: name, json: b} }

// Key is a member that holds a key, in standard base64.
func Key(name string, key []byte) Member { return Member{name: name, key: key} }

// Object returns the JSON of an object with those members, whose names are not
// escaped. The caller clears it.
func Object(members ...Member) []byte {
	size := len("{}")
	for _, m := range members {
		size += len(`"":"",`) + len(m.name) + len(m.json) + base64.StdEncoding.EncodedLen(len(m.key))
	}
	b := append(make([]byte, 0, size), '{')
	for i, m := range members {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(append(append(b, '"'), m.name...), `":`...)
		if m.json != nil {
			b = append(b, m.json...)
			continue
		}
		b = append(base64.StdEncoding.AppendEncode(append(b, '"'), m.key), '"')
	}
	return append(b, '}')
}

// errNotObject is the error of Decode. That of encoding/json may quote its input,
// which holds keys.
var errNotObject = errors.New("it is not a JSON object with the members that it has to have")

// Decode decodes an object into v, and refuses members with other names than
// those given. The caller clears b, and the keys that v then has.
func Decode(b []byte, v any, names ...string) error {
	var members map[string]json.RawMessage
	err := json.Unmarshal(b, &members)
	for name, raw := range members {
		clear(raw)
		if !slices.Contains(names, name) {
			err = errNotObject
		}
	}
	if err != nil || members == nil || json.Unmarshal(b, v) != nil {
		return errNotObject
	}
	return nil
}

// ReadAll reads r to its end, and clears what it outgrows. The caller clears
// what it returns, also with an error.
func ReadAll(r io.Reader) ([]byte, error) {
	b := make([]byte, 0, 1<<10)
	for {
		n, err := r.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		if err == io.EOF {
			return b, nil
		}
		if err != nil {
			return b, err
		}
		if len(b) == cap(b) {
			b = grow(b, 4*cap(b))
		}
	}
}

// Append is append, and clears b if it outgrows its array.
func Append(b, more []byte) []byte {
	if size := len(b) + len(more); size > cap(b) {
		b = grow(b, 2*size)
	}
	return append(b, more...)
}

func grow(b []byte, size int) []byte {
	grown := append(make([]byte, 0, size), b...)
	clear(b)
	return grown
}
