package commandline

import (
	"fmt"
	"slices"
	"strings"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/mistyped"
)

// flag is a flag of urfave/cli. Most also have TakesValue and IsRequired.
type flag interface{ Names() []string }

// command is a command with its flags and the commands below it.
type command struct {
	names       []string
	flags       []flag
	commands    []command
	helpCommand bool
}

// helpNames are those of the flag --help and of the command help.
var helpNames = []string{"help", "h"}

// arrange returns the arguments with the flags of each command before its other
// arguments, which follow "--": urfave/cli v2 looks for flags there only, and v3 drops
// what follows an argument "-". It checks the names of commands and flags, which flags
// need a value, and which are required, as the library answers mistakes there with
// errors of no type of their own.
func arrange(app command, args []string) ([]string, error) {
	if len(args) == 0 || args[len(args)-1] == completionFlag {
		return args, nil
	}
	l := level{command: app, path: app.names[0]}
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
		out = append(out, sub.names[0])
		l = level{command: *sub, path: l.path + " " + sub.names[0]}
		rest = left
	}
}

// level is a command and the names on the way to it, as in "copilot keys create".
type level struct {
	command
	path string
}

// split splits the arguments after a command into its flags and words, up to the
// command below it if one is named. What follows that is left, as is what is not
// checked.
func (l level) split(args []string) (flags, words []string, sub *command, left []string, err error) {
	given := make(map[string]bool)
	for i := 0; i < len(args); i++ {
		arg := args[i]
		if arg == "--" {
			words = append(words, args[i+1:]...)
			break
		}
		if arg == "-" || !strings.HasPrefix(arg, "-") {
			if len(l.commands) == 0 {
				words = append(words, arg)
				continue
			}
			if l.helpCommand && slices.Contains(helpNames, arg) {
				return flags, nil, nil, args[i:], nil
			}
			for _, c := range l.commands {
				if slices.Contains(c.names, arg) {
					return flags, nil, &c, args[i+1:], nil
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
		case !takesValue && hasValue && value == "": // v3 takes it for true
			return nil, nil, nil, nil, l.usage("%s= needs true or false", dashed(name))
		}
	}
	if len(words) > 0 && len(l.commands) > 0 { // after --
		return nil, nil, nil, nil, l.unknownCommand(words[0])
	}
	for _, f := range l.flags {
		if r, ok := f.(interface{ IsRequired() bool }); ok && r.IsRequired() && !given[f.Names()[0]] {
			return nil, nil, nil, nil, l.usage("%s is required", dashed(f.Names()[0]))
		}
	}
	return flags, words, nil, nil, nil
}

func takesValue(f flag) bool {
	v, ok := f.(interface{ TakesValue() bool })
	return ok && v.TakesValue()
}

func (l level) flag(name string) flag {
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
	for _, c := range l.commands {
		names = append(names, c.names...)
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
