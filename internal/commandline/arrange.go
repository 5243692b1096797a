package commandline

import (
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/mistyped"
)

// completionFlag is what shells append to ask what can follow.
const completionFlag = "--generate-bash-completion"

// arrange returns the arguments with the flags of each command before its other
// arguments, where urfave/cli v2 wants them. It checks the names of commands and
// flags, which ones need a value, and which are required, as the library answers
// mistakes there with pages of help.
func arrange(app *cli.App, args []string) ([]string, error) {
	if len(args) == 0 || args[len(args)-1] == completionFlag {
		return args, nil
	}
	l := level{path: app.Name, flags: app.Flags, commands: app.Commands, helpCommand: !app.HideHelpCommand}
	l.flags = append(l.flags[:len(l.flags):len(l.flags)], cli.VersionFlag)
	out := args[:1:1]
	for rest := args[1:]; ; {
		flags, words, sub, left, err := l.split(rest)
		if err != nil {
			return nil, err
		}
		out = append(out, flags...)
		if sub == nil {
			if slices.ContainsFunc(words, func(w string) bool { return len(w) > 1 && w[0] == '-' }) {
				out = append(out, "--")
			}
			return append(append(out, words...), left...), nil
		}
		out = append(out, sub.Name)
		l = level{path: l.path + " " + sub.Name, flags: sub.Flags, commands: sub.Subcommands, helpCommand: !sub.HideHelpCommand}
		rest = left
	}
}

// level is a command with its flags and what is below it.
type level struct {
	path        string
	flags       []cli.Flag
	commands    []*cli.Command
	helpCommand bool
}

// split splits the arguments after a command into its flags and words, up to the
// command below it if one is named. What follows that is left, as is all that is
// not to be looked at.
func (l level) split(args []string) (flags, words []string, sub *cli.Command, left []string, err error) {
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
			if l.helpCommand && (arg == "help" || arg == "h") {
				return flags, nil, nil, args[i:], nil
			}
			for _, c := range l.commands {
				if c.HasName(arg) {
					return flags, nil, c, args[i+1:], nil
				}
			}
			return nil, nil, nil, nil, l.unknownCommand(arg)
		}
		name, _, hasValue := strings.Cut(strings.TrimPrefix(arg[1:], "-"), "=")
		f := l.flag(name)
		if f == nil {
			return nil, nil, nil, nil, l.unknownFlag(arg, name)
		}
		given[f.Names()[0]] = true
		flags = append(flags, arg)
		if doc, ok := f.(cli.DocGenerationFlag); ok && doc.TakesValue() && !hasValue {
			if i++; i == len(args) {
				return nil, nil, nil, nil, l.usage("%s needs a value", dashed(name))
			}
			flags = append(flags, args[i])
		}
	}
	if given[cli.HelpFlag.Names()[0]] {
		return flags, words, nil, nil, nil
	}
	for _, f := range l.flags {
		if r, ok := f.(cli.RequiredFlag); ok && r.IsRequired() && !given[f.Names()[0]] {
			return nil, nil, nil, nil, l.usage("%s is required", dashed(f.Names()[0]))
		}
	}
	return flags, words, nil, nil, nil
}

func (l level) flag(name string) cli.Flag {
	for _, f := range append(l.flags[:len(l.flags):len(l.flags)], cli.HelpFlag) {
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
		names = append(names, c.Names()...)
	}
	return l.usage("unknown command %q%s", name, mistyped.DidYouMean(name, names))
}

func (l level) unknownFlag(arg, name string) error {
	var names []string
	for _, f := range append(l.flags[:len(l.flags):len(l.flags)], cli.HelpFlag) {
		names = append(names, f.Names()...)
	}
	for i, n := range names {
		names[i] = dashed(n)
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
