package main

import (
	"encoding"
	"fmt"
	"os"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v3"
)

// setting is a field of [configuration], which is set in pilot.toml, by a variable or
// by a flag.
type setting struct {
	name, usage string
	restart     bool
	field       int
}

// settings are the fields of [configuration], in their order.
var settings = func() (list []setting) {
	t := reflect.TypeFor[configuration]()
	for i := range t.NumField() {
		tag := t.Field(i).Tag
		list = append(list, setting{tag.Get("toml"), tag.Get("usage"), tag.Get("reload") == "no", i})
	}
	return list
}()

func (s setting) env() string {
	return "PILOT_" + strings.ToUpper(strings.ReplaceAll(s.name, "-", "_"))
}

func (s setting) flag(conf *configuration, hidden bool) cli.Flag {
	if _, ok := s.pointer(conf).(*bool); ok {
		return &cli.BoolFlag{Name: s.name, Usage: s.usage, Sources: cli.EnvVars(s.env()), Hidden: hidden}
	}
	return &cli.StringFlag{Name: s.name, Usage: s.usage, Sources: cli.EnvVars(s.env()), DefaultText: s.text(conf), Hidden: hidden}
}

// unsetEmptyVariables unsets variables that are empty, which in a unit or a manifest
// means that the setting is not set.
func unsetEmptyVariables() {
	for _, s := range settings {
		if os.Getenv(s.env()) == "" {
			os.Unsetenv(s.env())
		}
	}
}

// pointer returns a pointer to the setting's field of conf.
func (s setting) pointer(conf *configuration) any {
	return reflect.ValueOf(conf).Elem().Field(s.field).Addr().Interface()
}

// text returns the value of the setting as set takes it.
func (s setting) text(conf *configuration) string {
	switch p := s.pointer(conf).(type) {
	case *time.Duration:
		text := p.String()
		if strings.HasSuffix(text, "m0s") {
			text = strings.TrimSuffix(text, "0s")
		}
		return text
	case fmt.Stringer:
		return p.String()
	}
	return fmt.Sprint(reflect.ValueOf(conf).Elem().Field(s.field))
}

// restore sets the setting to what it is in was.
func (s setting) restore(conf, was *configuration) {
	reflect.ValueOf(conf).Elem().Field(s.field).Set(reflect.ValueOf(was).Elem().Field(s.field))
}

// set sets the setting from text: a flag, a variable, or a value of the file.
func (s setting) set(conf *configuration, text string) error {
	switch p := s.pointer(conf).(type) {
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
		panic(fmt.Sprintf("%s is a %T", s.name, p))
	}
	return nil
}
