// Package tomlfile reads configuration from TOML, with errors in one line that say
// where the file is wrong.
package tomlfile

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/ctrlplane/pilot/internal/mistyped"
)

// Decode decodes b, the content of the file name, into v. A setting that v has no
// field for is an error. Errors name the file and the line.
func Decode(name string, b []byte, v any) error {
	err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(v)
	var strict *toml.StrictMissingError
	var bad *toml.DecodeError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &strict) && len(strict.Errors) > 0:
		line, _ := strict.Errors[0].Position()
		return unknown(name, line, strict.Errors[0].Key(), v)
	case errors.As(err, &bad):
		line, column := bad.Position()
		return fmt.Errorf("%s:%d:%d: %s", name, line, column, strings.TrimPrefix(bad.Error(), "toml: "))
	}
	return fmt.Errorf("%s: %w", name, err)
}

// DecodeText decodes b, the content of the file name, for a program whose settings are
// read from text also where they are flags and variables. v is a pointer to a struct
// that has a field with the tag toml for each setting. set gets the settings in the
// order of the file, as text: an array of strings with commas between them, and, for a field that is a slice of structs, as
// JSON. Errors,
// those of set too, name the file, the line and the setting.
func DecodeText(name string, b []byte, v any, set func(key, text string) error) error {
	return decodeText(name, b, v, false, set)
}

// DecodePart does so for a program that has some of the settings of the file only. It
// ignores the others, except those that look like one of its own, mistyped.
func DecodePart(name string, b []byte, v any, set func(key, text string) error) error {
	return decodeText(name, b, v, true, set)
}

func decodeText(name string, b []byte, v any, part bool, set func(key, text string) error) error {
	var values map[string]any
	if err := Decode(name, b, &values); err != nil {
		return err
	}
	lines := keyLines(b)
	known := names(v)
	for _, key := range slices.SortedFunc(maps.Keys(values), func(a, b string) int { return lines[a] - lines[b] }) {
		if !slices.Contains(known, key) {
			if part && mistyped.DidYouMean(key, known) == "" {
				continue
			}
			return unknown(name, lines[key], toml.Key{key}, v)
		}
		text, err := "", error(nil)
		if hasTables(v, key) {
			var b []byte
			b, err = json.Marshal(values[key])
			text = string(b)
		} else {
			text, err = textOf(values[key])
		}
		if err == nil {
			err = set(key, text)
		}
		if err != nil {
			return fmt.Errorf("%s:%d: %s: %w", name, lines[key], key, err)
		}
	}
	return nil
}

// hasTables reports whether the field of a setting is of tables: a slice of structs.
func hasTables(v any, key string) bool {
	for _, f := range reflect.VisibleFields(reflect.TypeOf(v).Elem()) {
		if f.Tag.Get("toml") == key {
			return f.Type.Kind() == reflect.Slice && f.Type.Elem().Kind() == reflect.Struct
		}
	}
	return false
}

// textOf returns the text of a value, as it would be in a flag.
func textOf(v any) (string, error) {
	switch v := v.(type) {
	case string, bool, int64:
		return fmt.Sprint(v), nil
	case []any:
		words := make([]string, len(v))
		for i, word := range v {
			var ok bool
			if words[i], ok = word.(string); !ok {
				return "", errors.New("the array has a value that is not a string")
			}
		}
		return strings.Join(words, ","), nil
	}
	return "", errors.New("a string, a number, true, false or an array of strings is expected")
}

// keyLines returns the line of each key at the top of b, which is valid TOML. The parser
// gives lines in errors only, so b is decoded into a struct without fields.
func keyLines(b []byte) map[string]int {
	lines := make(map[string]int)
	var strict *toml.StrictMissingError
	if errors.As(toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(&struct{}{}), &strict) {
		for _, e := range strict.Errors {
			if key := e.Key()[0]; lines[key] == 0 {
				lines[key], _ = e.Position()
			}
		}
	}
	return lines
}

// unknown returns the error of a key that v has no field for.
func unknown(name string, line int, key toml.Key, v any) error {
	question := ""
	if len(key) == 1 {
		question = mistyped.DidYouMean(key[0], names(v))
	}
	return fmt.Errorf("%s:%d: %s: unknown setting%s", name, line, strings.Join(key, "."), question)
}

// names returns the names of the settings in a struct that v points to, and none if v
// points to something else.
func names(v any) (list []string) {
	t := reflect.TypeOf(v).Elem()
	if t.Kind() != reflect.Struct {
		return nil
	}
	for _, f := range reflect.VisibleFields(t) {
		if !f.Anonymous {
			list = append(list, f.Tag.Get("toml"))
		}
	}
	return list
}
