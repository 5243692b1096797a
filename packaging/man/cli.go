package man

import (
	"strings"

	"github.com/urfave/cli/v3"
)

// Commands returns the commands of a program, those below others with the others' names
// before theirs.
func Commands(commands []*cli.Command, above ...string) []Command {
	var list []Command
	for _, c := range commands {
		if c.Hidden || c.Name == "help" {
			continue
		}
		name := append(above[:len(above):len(above)], c.Name)
		if len(c.Commands) > 0 {
			list = append(list, Commands(c.Commands, name...)...)
			continue
		}
		list = append(list, Command{strings.Join(name, " "), strings.TrimPrefix(c.ArgsUsage, "[flags] "), c.Usage, c.Description, options(c.Flags)})
	}
	return list
}

// flag is what all flags have.
type flag interface {
	Names() []string
	TakesValue() bool
	GetUsage() string
	GetDefaultText() string
	GetValue() string
	GetEnvVars() []string
}

func options[F any](flags []F) []Option {
	var list []Option
	for _, f := range flags {
		f, ok := any(f).(flag)
		if !ok || f.Names()[0] == "help" {
			continue
		}
		o := Option{Name: f.Names()[0], Usage: f.GetUsage()}
		if env := f.GetEnvVars(); len(env) > 0 {
			o.Variable = strings.Join(env, ", $")
		}
		if f.TakesValue() {
			o.Value = "VALUE"
			if m := emphasis.FindStringSubmatch(o.Usage); m != nil {
				o.Value = m[1]
			}
			o.Default = f.GetDefaultText()
			if o.Default == "" { // in v3, where a value is the default
				o.Default = f.GetValue()
			}
			o.Default = strings.Trim(o.Default, `"`)
		}
		list = append(list, o)
	}
	return list
}
