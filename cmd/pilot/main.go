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
		Usage:   "decrypt encrypted container images on nodes, and wrap and unwrap their keys",
		Version: version.Text(),
		Description: `pilot wraps and unwraps the layer keys of encrypted images with keys from a key broker:
for containerd as its differ, which decrypts layers, and for skopeo, buildah, podman
and CRI-O as a key provider. Those find it through a file such as

   {"key-providers": {"pilot": {"grpc": "unix:///run/pilot/keyprovider.sock"}}}

named by OCICRYPT_KEYPROVIDER_CONFIG. "ctr-pilot" encrypts images.

Example, a node:
   pilot node install --now --broker https://copilot.example.com:8443 \
      --broker-ca ca.pem --broker-cert node.pem --broker-key node-key.pem
   pilot node doctor --kek team-a`,
		Commands: []*cli.Command{serveCommand, keyproviderCommand, mirrorCommand, kbsPluginCommand, snapshotterCommand, nriPluginCommand, nodeCommand},
	})
}
