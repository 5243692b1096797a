package tomlfile

import (
	"errors"
	"strings"
	"testing"
)

type configuration struct {
	Broker  string            `toml:"broker"`
	Size    int               `toml:"size"`
	On      bool              `toml:"on"`
	KEKs    []string          `toml:"keks"`
	Issuers map[string]string `toml:"issuers"`
}

func TestDecodeNamesUnknownSettings(t *testing.T) {
	for text, want := range map[string]string{
		"broker = \"a\"\nbrokr = 1\nzzz = 2": "f:2: brokr: unknown setting: did you mean broker?",
		"[other]\nbroker = 1":                "f:1: other: unknown setting",
		"\n[broker]\nx = 1":                  "f:2:2: ",
		"size = \"x\"":                       "f:1:8: ",
		"size = ":                            "f:1:",
	} {
		if err := Decode("f", []byte(text), new(configuration)); err == nil || !strings.HasPrefix(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

func TestDecodeTextGivesSettingsInTheirOrder(t *testing.T) {
	var got []string
	err := DecodeText("f", []byte("# a comment\nsize = -4\nkeks = [\"b\", # first\n\"a\"]\n\"on\" = true\nbroker = \"\"\"\ntwo\nlines\"\"\"\n"), new(configuration), func(key, text string) error {
		got = append(got, key+"="+text)
		return nil
	})
	if want := "size=-4|keks=b,a|on=true|broker=two\nlines"; err != nil || strings.Join(got, "|") != want {
		t.Errorf("%q, %v, want %q", got, err, want)
	}
}

var errBad = errors.New("bad")

func TestDecodeTextNamesBadValues(t *testing.T) {
	for text, want := range map[string]string{
		"size = 1\n\nbroker = \"bad\"":    "f:3: broker: bad",
		"on = 1.5":                        "f:1: on: a string, a number, true, false or an array of strings is expected",
		"on = 2026-01-01":                 "f:1: on: a string, a number, true, false or an array of strings is expected",
		"\nkeks = [\"a\", 1]":             "f:2: keks: the array has a value that is not a string",
		"[broker]\nx = 1":                 "f:1: broker: a string, a number",
		"size = 1\nbroker.x = 1":          "f:2: broker: a string, a number",
		"size = 1\n[other]\n":             "f:2: other: unknown setting",
		"size = 1\n[[keks]]\n":            "f:2: keks: the array has a value that is not a string",
		"brokerr = 1\nbroker = \"bad\"":   "f:1: brokerr: unknown setting: did you mean broker?",
		"broker = \"bad\"\nbrokerr = 1\n": "f:1: broker: bad",
		"size = 1\nsize = 2":              "f:2:",
		"size = 99999999999999999999":     "f:1:",
	} {
		err := DecodeText("f", []byte(text), new(configuration), func(_, text string) error {
			if text == "bad" {
				return errBad
			}
			return nil
		})
		if err == nil || !strings.HasPrefix(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

// TestTablesBecomeJSON has a setting that is a slice of structs.
func TestTablesBecomeJSON(t *testing.T) {
	var v struct {
		Size  int                     `toml:"size"`
		Rules []struct{ Name string } `toml:"rules"`
	}
	for text, want := range map[string]string{
		"[[rules]]\nname = 'a,b'\nkeks = ['x']\n[[rules]]\n": `[{"keks":["x"],"name":"a,b"},{}]`,
		"rules = 'x'": `"x"`,
	} {
		var got string
		err := DecodeText("f", []byte(text), &v, func(key, text string) error {
			got = text
			return nil
		})
		if err != nil || got != want {
			t.Errorf("%q: %s, %v", text, got, err)
		}
	}
}
