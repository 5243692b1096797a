// Command ctr-pilot is containerd's ctr with image encryption.
package main

import (
	"context"
	"fmt"
	"os"
	"slices"

	"github.com/containerd/containerd/v2/cmd/ctr/app"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/coredump"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/version"
	"github.com/ctrlplane/pilot/keyprovider/agekey"
)

// suppressDeprecations is a variable of ctr's. Set to false, the warnings appear.
const suppressDeprecations = "CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS"

func main() {
	os.Exit(run())
}

// run runs the command line and returns the exit status.
func run() int {
	agekey.IsolatePlugins()
	if err := coredump.Disable(); err != nil {
		fmt.Fprintln(os.Stderr, "ctr-pilot: core dumps can't be disabled:", err)
		return 1
	}
	// containerd's deprecations are its administrator's concern: "deprecations
	// list" shows them, and each command of ctr's would.
	if os.Getenv(suppressDeprecations) == "" {
		if err := os.Setenv(suppressDeprecations, "true"); err != nil {
			fmt.Fprintln(os.Stderr, "ctr-pilot:", err)
			return 1
		}
	}
	if err := newApp().Run(context.Background(), os.Args); err != nil {
		fmt.Fprintln(os.Stderr, "ctr-pilot:", shownText(err.Error())) // images and registries are quoted in it
		return status(err)
	}
	return 0
}

// newApp returns ctr's application with what pilot adds to it.
func newApp() *cli.Command {
	a := app.New()
	a.Name = "ctr-pilot"
	a.Usage = "containerd's ctr, with image encryption"
	a.Version = version.Text()
	a.Description = `All of ctr's commands, and those of "images" for encrypted images:

   ctr-pilot images encrypt --recipient provider:pilot:team-a app:1 app:encrypted
   ctr-pilot images layerinfo app:encrypted
   ctr-pilot images rewrap app:encrypted
   ctr-pilot images pull registry.example.com/app:encrypted

Key providers are found in the file that OCICRYPT_KEYPROVIDER_CONFIG names, or
in ` + defaultKeyProviders + `.

` + exit.Help + `

"run", "tasks exec" and the like exit with the status of what ran in the container.`
	images := subcommand(a, "images")
	wrapPull(subcommand(images, "pull"))
	wrapImport(subcommand(images, "import"))
	wrapPush(subcommand(images, "push"))
	wrapExport(subcommand(images, "export"))
	// All of ctr's commands that use the transfer service.
	for _, name := range []string{"pull", "push", "import", "export", "tag"} {
		alwaysLocal(subcommand(images, name))
	}
	wrapUse(subcommand(a, "run"))
	wrapUse(subcommand(subcommand(a, "containers"), "create"))
	wrapUse(subcommand(images, "mount"))
	images.Commands = append(images.Commands, encryptCommand, decryptCommand, rewrapCommand, layerinfoCommand)
	// ctr has these only below images.
	for _, name := range []string{"pull", "push", "import", "export"} {
		a.Commands = append(a.Commands, subcommand(images, name))
	}
	withStoredCredentials(subcommand(subcommand(a, "content"), "fetch"))
	explainUsage(a, a.Name)
	return a
}

// subcommand returns one of ctr's own commands.
func subcommand(c *cli.Command, name string) *cli.Command {
	i := slices.IndexFunc(c.Commands, func(c *cli.Command) bool { return c.Name == name })
	if i < 0 {
		panic("ctr has no command " + c.Name + " " + name)
	}
	return c.Commands[i]
}
