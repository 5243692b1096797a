package commandline

import (
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/mistyped"
)

// helpNames are those of the flag --help and of the command help.
var helpNames = []string{"help", "h"}

// arrange returns the arguments with the flags of each command before its other
// arguments, which follow "--", as urfave/cli drops what follows an argument "-". It
// checks the names of commands and flags, which flags need a value, and which are
// required, as the library's errors have no types for these.
func arrange(app *cli.Command, args []string) ([]string, error) {
	if len(args) == 0 {
		return args, nil
	}
	l := level{app, app.Name, append(app.Flags[:len(app.Flags):len(app.Flags)], cli.VersionFlag)}
	out := args[:1:1]
	for rest := args[1:]; ; {
		flags, words, sub, left, err := l.split(rest)
		if err != nil {
			return nil, err
		}
		out = append(out, flags...)
		if sub == nil {
			if len(words) > 0 {
				out = append(out, "--")
			}
			return append(append(out, words...), left...), nil
		}
		out = append(out, sub.Name)
		if sub.SkipFlagParsing {
			return append(append(out, "--"), left...), nil
		}
		l = level{sub, l.path + " " + sub.Name, sub.Flags}
		rest = left
	}
}

// level is a command, with the names on the way to it, as in "copilot keys create".
type level struct {
	*cli.Command
	path  string
	flags []cli.Flag
}

// split splits the arguments after a command into its flags and words, up to the
// command below it if one is named. What follows that is left, as is what is not
// checked.
func (l level) split(args []string) (flags, words []string, sub *cli.Command, left []string, err error) {
	given := make(map[string]bool)
	for i := 0; i < len(args); i++ {
		arg := args[i]
		if arg == "--" {
			words = append(words, args[i+1:]...)
			break
		}
		if arg == "-" || !strings.HasPrefix(arg, "-") {
			if len(l.Commands) == 0 {
				words = append(words, arg)
				continue
			}
			if !l.HideHelpCommand && slices.Contains(helpNames, arg) {
				return flags, nil, nil, args[i:], nil
			}
			for _, c := range l.Commands {
				if c.HasName(arg) {
					return flags, nil, c, args[i+1:], nil
				}
			}
			return nil, nil, nil, nil, l.unknownCommand(arg)
		}
		name, value, hasValue := strings.Cut(strings.TrimPrefix(arg[1:], "-"), "=")
		if slices.Contains(helpNames, name) {
			return []string{"--help"}, nil, nil, nil, nil
		}
		f := l.flag(name)
		if f == nil {
			return nil, nil, nil, nil, l.unknownFlag(arg, name)
		}
		given[f.Names()[0]] = true
		flags = append(flags, arg)
		switch takesValue := takesValue(f); {
		case takesValue && !hasValue:
			if i++; i == len(args) {
				return nil, nil, nil, nil, l.usage("%s needs a value", dashed(name))
			}
			flags = append(flags, args[i])
		case !takesValue && hasValue && value == "": // the library takes it for true
			return nil, nil, nil, nil, l.usage("%s= needs true or false", dashed(name))
		}
	}
	if len(words) > 0 && len(l.Commands) > 0 { // after --
		return nil, nil, nil, nil, l.unknownCommand(words[0])
	}
	for _, f := range l.flags {
		if r, ok := f.(cli.RequiredFlag); ok && r.IsRequired() && !given[f.Names()[0]] {
			return nil, nil, nil, nil, l.usage("%s is required", dashed(f.Names()[0]))
		}
	}
	return flags, words, nil, nil, nil
}

func takesValue(f cli.Flag) bool {
	doc, ok := f.(cli.DocGenerationFlag)
	return ok && doc.TakesValue()
}

func (l level) flag(name string) cli.Flag {
	for _, f := range l.flags {
		if slices.Contains(f.Names(), name) {
			return f
		}
	}
	return nil
}

// usage returns the error of a command line, with where there is more.
func (l level) usage(format string, a ...any) error {
	return exit.CommandUsage(l.path, fmt.Sprintf(format, a...))
}

func (l level) unknownCommand(name string) error {
	var names []string
	for _, c := range l.Commands {
		names = append(names, c.Names()...)
	}
	return l.usage("unknown command %q%s", name, mistyped.DidYouMean(name, names))
}

func (l level) unknownFlag(arg, name string) error {
	names := []string{"--help"}
	for _, f := range l.flags {
		for _, n := range f.Names() {
			names = append(names, dashed(n))
		}
	}
	arg, _, _ = strings.Cut(arg, "=")
	return l.usage("unknown flag %s%s", arg, mistyped.DidYouMean(dashed(name), names))
}

func dashed(name string) string {
	if len(name) == 1 {
		return "-" + name
	}
	return "--" + name
}
