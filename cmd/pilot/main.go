// Command pilot is the key provider of a node or of a CI machine, which wraps and
// unwraps the keys of image layers for ocicrypt's tools, and containerd's differ.
package main

import (
	"fmt"
	"os"

	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/commandline"
	"github.com/ctrlplane/pilot/internal/coredump"
	"github.com/ctrlplane/pilot/internal/version"
	"github.com/ctrlplane/pilot/keyprovider/agekey"
)

func main() {
	os.Exit(run())
}

// run runs the command line and returns the exit status.
func run() int {
	agekey.IsolatePlugins()
	isolate()
	if err := coredump.Disable(); err != nil {
		fmt.Fprintf(os.Stderr, "pilot: core dumps can't be disabled: %s\n", err)
		return 1
	}
	logrus.SetOutput(os.Stderr)
	unsetEmptyVariables()
	return commandline.Run(newApp())
}

func newApp() *cli.Command {
	return commandline.Complete(&cli.Command{
		Name:    "pilot",
		Usage:   "wrap and unwrap the keys of encrypted container images",
		Version: version.Text(),
		Description: `pilot serves ocicrypt's key provider protocol with keys from a key broker.
Tools find it through a file such as

   {"key-providers": {"pilot": {"grpc": "unix:///run/pilot/keyprovider.sock"}}}

named by OCICRYPT_KEYPROVIDER_CONFIG.`,
		Commands: []*cli.Command{serveCommand, keyproviderCommand, mirrorCommand, snapshotterCommand, nriPluginCommand, nodeCommand},
	})
}
