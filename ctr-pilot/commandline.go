package main

import (
	"context"
	"errors"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/mistyped"
	"github.com/ctrlplane/pilot/processor"
)

// explainUsage makes a command and those below it answer a usage error with one line
// instead of their help.
func explainUsage(c *cli.Command, path string) {
	group := len(c.Commands) > 0 // the library adds help later, to every command
	c.OnUsageError = func(_ context.Context, c *cli.Command, err error, _ bool) error {
		// The library reads the flags after an unknown command before it looks at that.
		if name := unknownCommand(c, c.Root(), os.Args[1:]); group && name != "" {
			return unknownCommandError(c, path, name)
		}
		return exit.CommandUsage(path, err.Error()+nearestFlag(c, os.Args[1:]))
	}
	if group && c.Action == nil {
		c.Action = func(_ context.Context, c *cli.Command) error {
			name := c.Args().First()
			if name == "" && c.Root() == c {
				return cli.ShowRootCommandHelp(c)
			}
			if name == "" {
				return cli.ShowSubcommandHelp(c)
			}
			return unknownCommandError(c, path, name)
		}
	}
	for _, sub := range c.Commands {
		explainUsage(sub, path+" "+sub.Name)
	}
}

func unknownCommandError(c *cli.Command, path, name string) error {
	var names []string
	for _, sub := range c.Commands {
		names = append(names, sub.Names()...)
	}
	return exit.CommandUsage(path, "unknown command \""+name+"\""+mistyped.DidYouMean(name, names))
}

// unknownCommand returns the first of args that is in the place of a command below c and
// is none, or nothing. at is the command that args begin after.
func unknownCommand(c, at *cli.Command, args []string) string {
	for i := 0; i < len(args) && len(at.Commands) > 0; i++ {
		flag, isFlag := strings.CutPrefix(args[i], "-")
		if !isFlag {
			sub := at.Command(args[i])
			if sub == nil && at == c {
				return args[i]
			}
			if sub == nil {
				return ""
			}
			at = sub
			continue
		}
		for _, f := range at.Flags {
			doc, ok := f.(cli.DocGenerationFlag)
			if ok && doc.TakesValue() && slices.Contains(f.Names(), strings.TrimPrefix(flag, "-")) {
				i++
			}
		}
	}
	return ""
}

// nearestFlag asks whether another flag was meant by something in args that looks like a
// flag and is none of c's: the library's error for that has no type.
func nearestFlag(c *cli.Command, args []string) string {
	known := make(map[string]bool)
	for _, cmd := range c.Lineage() {
		for _, f := range cmd.Flags {
			for _, n := range f.Names() {
				known[dashed(n)] = true
			}
		}
	}
	names := slices.Sorted(maps.Keys(known))
	for _, arg := range args {
		name, _, _ := strings.Cut(strings.TrimLeft(arg, "-"), "=")
		if ours := flagOfSkopeo[name]; ours != "" && strings.HasPrefix(arg, "-") && !known[dashed(name)] {
			return ", which is skopeo's: use " + ours
		}
		name = dashed(name)
		if arg == "--" {
			break
		}
		if question := mistyped.DidYouMean(name, names); question != "" && strings.HasPrefix(arg, "-") && !known[name] {
			return question
		}
	}
	return ""
}

// flagOfSkopeo has our flags for those of skopeo, buildah and podman that have other names.
var flagOfSkopeo = map[string]string{
	"encryption-key": "--recipient", "decryption-key": "--key", "encrypt-layer": "--layer",
	"creds": "--user", "src-creds": "--user", "dest-creds": "--user",
	"tls-verify": "--skip-verify or --plain-http", "src-tls-verify": "--skip-verify or --plain-http", "dest-tls-verify": "--skip-verify or --plain-http",
}

func dashed(name string) string {
	if len(name) == 1 {
		return "-" + name
	}
	return "--" + name
}

// status returns the exit status for an error.
func status(err error) int {
	// What ran in a container, as ctr has it.
	if coder := cli.ExitCoder(nil); errors.As(err, &coder) {
		return coder.ExitCode()
	}
	if status := exit.Status(err); status != exit.Failed || !errors.Is(err, processor.ErrDenied) {
		return status
	}
	return exit.Denied
}
