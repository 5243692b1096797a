package man

import (
	"strings"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/exit"
)

// NewPage returns the page of a program. Its exit statuses are in what follows the page.
func NewPage(app *cli.Command) *Page {
	return &Page{
		Name: app.Name, Version: app.Version, Summary: app.Usage,
		Description: strings.TrimSuffix(app.Description, "\n\n"+exit.Help),
		Commands:    Commands(app.Commands),
	}
}

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

func options(flags []cli.Flag) []Option {
	var list []Option
	for _, flag := range flags {
		f, ok := flag.(cli.DocGenerationFlag)
		if !ok || flag.Names()[0] == "help" {
			continue
		}
		o := Option{Name: flag.Names()[0], Usage: f.GetUsage()}
		if env := f.GetEnvVars(); len(env) > 0 {
			o.Variable = strings.Join(env, ", $")
		}
		if f.TakesValue() {
			o.Value = "VALUE"
			if m := emphasis.FindStringSubmatch(o.Usage); m != nil {
				o.Value = m[1]
			}
			o.Default = f.GetDefaultText()
			if o.Default == "" {
				o.Default = f.GetValue()
			}
			o.Default = strings.Trim(o.Default, `"`)
		}
		list = append(list, o)
	}
	return list
}
