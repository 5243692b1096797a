// Package setting has settings of pilot's that are fields of a struct. Each is a key of
// pilot.toml, a PILOT_ variable and a flag, with the same text in all of them.
package setting

import (
	"encoding"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v3"
)

// Setting is a field of a struct. Its tags are toml, its name, and usage. Those with
// reload:"no" take effect when a program starts.
type Setting struct {
	Name, Usage string
	Restart     bool
	index       []int
}

// Of returns the settings that are fields of a struct and of those embedded in it, in their
// order. The methods of a setting take pointers to such a struct.
func Of[T any]() (list []Setting) {
	for _, f := range reflect.VisibleFields(reflect.TypeFor[T]()) {
		if !f.Anonymous {
			list = append(list, Setting{f.Tag.Get("toml"), f.Tag.Get("usage"), f.Tag.Get("reload") == "no", f.Index})
		}
	}
	return list
}

// Env returns the variable of the setting.
func (s Setting) Env() string {
	return "PILOT_" + strings.ToUpper(strings.ReplaceAll(s.Name, "-", "_"))
}

// Flag returns the flag of the setting, with its default from v.
func (s Setting) Flag(v any, hidden bool) cli.Flag {
	if _, ok := s.pointer(v).(*bool); ok {
		return &cli.BoolFlag{Name: s.Name, Usage: s.Usage, Sources: cli.EnvVars(s.Env()), Hidden: hidden}
	}
	return &cli.StringFlag{Name: s.Name, Usage: s.Usage, Sources: cli.EnvVars(s.Env()), DefaultText: s.Text(v), Hidden: hidden}
}

func (s Setting) field(v any) reflect.Value { return reflect.ValueOf(v).Elem().FieldByIndex(s.index) }

func (s Setting) pointer(v any) any { return s.field(v).Addr().Interface() }

// Text returns the value of the setting as Set takes it.
func (s Setting) Text(v any) string {
	switch p := s.pointer(v).(type) {
	case *time.Duration:
		text := p.String()
		if strings.HasSuffix(text, "m0s") {
			text = strings.TrimSuffix(text, "0s")
		}
		return text
	case fmt.Stringer:
		return p.String()
	}
	return fmt.Sprint(s.field(v))
}

// Restore sets the setting to what it is in was.
func (s Setting) Restore(v, was any) { s.field(v).Set(s.field(was)) }

// Set sets the setting from text: a flag, a variable, or a value of the file.
func (s Setting) Set(v any, text string) error {
	switch p := s.pointer(v).(type) {
	case *string:
		*p = text
	case *bool:
		if text != "true" && text != "false" {
			return fmt.Errorf("%q is neither true nor false", text)
		}
		*p = text == "true"
	case *int:
		n, err := strconv.Atoi(text)
		if err != nil || n < 0 {
			return fmt.Errorf("%q is not a number of 0 or more", text)
		}
		*p = n
	case *time.Duration:
		d, err := time.ParseDuration(text)
		if err != nil {
			return fmt.Errorf("%q is not a duration such as 10s or 5m", text)
		}
		if d < 0 {
			return fmt.Errorf("%s is negative", d)
		}
		*p = d
	case *logrus.Level:
		level, err := logrus.ParseLevel(text)
		if err != nil {
			return fmt.Errorf("%q is not a log level: use debug, info, warning or error", text)
		}
		*p = level
	case encoding.TextUnmarshaler:
		return p.UnmarshalText([]byte(text))
	default:
		panic(fmt.Sprintf("%s is a %T", s.Name, p))
	}
	return nil
}

// Words sets list to the words of text, which are separated by commas. check gets each word
// and those before it.
func Words(list *[]string, text []byte, check func(word string, before []string) error) error {
	*list = nil
	for word := range strings.SplitSeq(string(text), ",") {
		word = strings.TrimSpace(word)
		if err := check(word, *list); err != nil {
			return err
		}
		*list = append(*list, word)
	}
	return nil
}
