// Package jsonedit edits JSON documents in place: it changes the bytes of one value
// and leaves all others as they are, white space and unknown members too.
//
// Documents are untrusted. What is not JSON, and an object that has a key twice, is
// an error.
package jsonedit

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// member is one member of a JSON object, by its offsets in the object's text.
type member struct {
	key        string
	start      int // of the key's opening quote
	value, end int // of the value
}

// CheckKeys returns an error if an object has a key that differs from one of keys only
// in capitalization: encoding/json takes the one for the other, and other readers do
// not.
func CheckKeys(object []byte, keys []string) error {
	list, err := members(object)
	if err != nil {
		return err
	}
	for _, m := range list {
		for _, k := range keys {
			if m.key != k && strings.EqualFold(m.key, k) {
				return fmt.Errorf("key %q can be taken for %q", m.key, k)
			}
		}
	}
	return nil
}

// CheckDistinct returns an error if text is not JSON, or if an object in it, at any
// depth, has a key twice.
func CheckDistinct(text []byte) error {
	d := json.NewDecoder(bytes.NewReader(text))
	type object struct {
		keys map[string]bool // nil: an array
		key  bool            // a key is next
	}
	var open []object
	for {
		t, err := d.Token()
		if err == io.EOF && len(open) == 0 && json.Valid(text) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("not JSON: %w", err)
		}
		in := len(open) - 1
		switch {
		case t == json.Delim('}') || t == json.Delim(']'):
			open = open[:in]
			in--
		case in >= 0 && open[in].key:
			key := t.(string)
			if open[in].keys[key] {
				return fmt.Errorf("duplicate key %q", key)
			}
			open[in].keys[key], open[in].key = true, false
			continue
		case t == json.Delim('{'):
			open = append(open, object{map[string]bool{}, true})
			continue
		case t == json.Delim('['):
			open = append(open, object{})
			continue
		}
		if in >= 0 && open[in].keys != nil {
			open[in].key = true // after a value
		}
	}
}

// members finds the members of an object, which may have white space around it. A
// duplicate key is an error.
func members(doc []byte) ([]member, error) {
	d := json.NewDecoder(bytes.NewReader(doc))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, errors.New("not a JSON object")
	}
	var list []member
	for d.More() {
		from := int(d.InputOffset())
		t, err := d.Token()
		if err != nil {
			return nil, err
		}
		m := member{key: t.(string), start: from + bytes.IndexByte(doc[from:], '"')}
		var v json.RawMessage
		if err := d.Decode(&v); err != nil {
			return nil, err
		}
		m.end = int(d.InputOffset())
		m.value = m.end - len(v)
		list = append(list, m)
	}
	seen := make(map[string]bool, len(list))
	for _, m := range list {
		if seen[m.key] {
			return nil, fmt.Errorf("duplicate key %q", m.key)
		}
		seen[m.key] = true
	}
	if _, err := d.Token(); err != nil {
		return nil, err
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("something follows the JSON object")
	}
	return list, nil
}

// Get returns the text of the value at key of an object, or nil if it has none.
func Get(doc []byte, key string) ([]byte, error) {
	list, err := members(doc)
	if err != nil {
		return nil, err
	}
	for _, m := range list {
		if m.key == key {
			return doc[m.value:m.end], nil
		}
	}
	return nil, nil
}

// Set returns an object with the value at key replaced, or added as the last member.
func Set(doc []byte, key string, value []byte) ([]byte, error) {
	list, err := members(doc)
	if err != nil {
		return nil, err
	}
	for _, m := range list {
		if m.key == key {
			return Splice(doc, m.value, m.end, value), nil
		}
	}
	added := append(append(Quote(key), ':'), value...)
	at := bytes.IndexByte(doc, '{') + 1
	if len(list) > 0 {
		added = append([]byte{','}, added...)
		at = list[len(list)-1].end
	}
	return Splice(doc, at, at, added), nil
}

// Edit returns an object with the value at key, if it has one, replaced by what f
// returns for it.
func Edit(doc []byte, key string, f func([]byte) ([]byte, error)) ([]byte, error) {
	value, err := Get(doc, key)
	if err != nil || value == nil {
		return doc, err
	}
	if value, err = f(value); err != nil {
		return nil, err
	}
	return Set(doc, key, value)
}

// Remove returns an object without the members whose keys drop selects. It undoes
// [Set]: a member that was added leaves no trace.
func Remove(doc []byte, drop func(key string) bool) ([]byte, error) {
	list, err := members(doc)
	if err != nil {
		return nil, err
	}
	kept := slices.IndexFunc(list, func(m member) bool { return !drop(m.key) })
	switch {
	case len(list) == 0:
		return doc, nil
	case kept < 0:
		return Splice(doc, list[0].start, list[len(list)-1].end, nil), nil
	}
	// A comma is removed with the member after it, except before the first one left.
	out := append(make([]byte, 0, len(doc)), doc[:list[0].start]...)
	from := list[kept].start
	for i := kept + 1; i < len(list); i++ {
		if drop(list[i].key) {
			out = append(out, doc[from:list[i-1].end]...)
			from = list[i].end
		}
	}
	return append(out, doc[from:]...), nil
}

// Elements returns the offsets of an array's elements: where each begins and ends.
func Elements(array []byte) (list [][2]int, err error) {
	d := json.NewDecoder(bytes.NewReader(array))
	if t, err := d.Token(); err != nil || t != json.Delim('[') {
		return nil, errors.New("not a JSON array")
	}
	for d.More() {
		var v json.RawMessage
		if err := d.Decode(&v); err != nil {
			return nil, err
		}
		end := int(d.InputOffset())
		list = append(list, [2]int{end - len(v), end})
	}
	if _, err := d.Token(); err != nil {
		return nil, err
	}
	return list, nil
}

// MapElements returns an array with each element replaced by what f returns for it.
func MapElements(doc []byte, f func(i int, element []byte) ([]byte, error)) ([]byte, error) {
	at, err := Elements(doc)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	copied := 0
	for i, e := range at {
		edited, err := f(i, doc[e[0]:e[1]])
		if err != nil {
			return nil, err
		}
		out.Write(doc[copied:e[0]])
		out.Write(edited)
		copied = e[1]
	}
	out.Write(doc[copied:])
	return out.Bytes(), nil
}

// Splice returns doc with the bytes from one offset to another replaced by others.
func Splice(doc []byte, from, to int, by []byte) []byte {
	out := make([]byte, 0, len(doc)-(to-from)+len(by))
	out = append(out, doc[:from]...)
	out = append(out, by...)
	return append(out, doc[to:]...)
}

// Quote returns s as a JSON string, with no more escapes than JSON needs.
func Quote(s string) []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(s); err != nil {
		panic(err) // a string
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}

// Unquote returns the string that text is in JSON, or an empty one if it is no string.
func Unquote(text []byte) string {
	var s string
	if json.Unmarshal(text, &s) != nil {
		return ""
	}
	return s
}
