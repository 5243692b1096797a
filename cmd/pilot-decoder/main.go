// Command pilot-decoder is a stream processor for containerd: it decrypts one
// layer of an image, from standard input to standard output.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ctrlplane/pilot/cmd/pilot-decoder/internal/minigrpc"
	"github.com/ctrlplane/pilot/internal/coredump"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/version"
	"github.com/ctrlplane/pilot/processor"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
)

// unwrapTimeout bounds the wait for the payload and for the layer key.
const unwrapTimeout = 40 * time.Second

// pipeSize is what the pipes to and from containerd are enlarged to, in bytes: what Linux
// allows without privileges.
const pipeSize = 1 << 20

const usage = `pilot-decoder: decrypt an image layer for containerd

   pilot-decoder [--decryption-keys-path DIRECTORY]
   pilot-decoder version

containerd runs this program for each encrypted layer that it unpacks, when its
configuration has an entry such as

   [stream_processors.'io.containerd.ocicrypt.decoder.v1.tar.gzip']
     accepts = ['application/vnd.oci.image.layer.v1.tar+gzip+encrypted']
     returns = 'application/vnd.oci.image.layer.v1.tar+gzip'
     path = '/usr/local/bin/pilot-decoder'
     env = ['OCICRYPT_KEYPROVIDER_CONFIG=/etc/pilot/ocicrypt.conf']

It reads the layer from standard input, and its descriptor and keys from file
descriptor 3, and writes the plain layer to standard output.

   --decryption-keys-path DIRECTORY   private keys to try, besides the key providers
   --version                          print the version

` + exit.Help + `
`

func main() {
	if os.Getenv(lingerVariable) != "" {
		linger()
		return
	}
	if err := decode(os.Args[1:]); err != nil {
		end := "\n"
		if info, err := os.Stderr.Stat(); err == nil && info.Mode()&os.ModeCharDevice == 0 {
			end = "" // containerd quotes it all
			keepOutputOpen()
		}
		fmt.Fprintf(os.Stderr, "pilot-decoder: %s%s", oneLine(err), end)
		os.Exit(status(err))
	}
}

func decode(args []string) error {
	payload, payloadErr := processor.PayloadFile() // before a file is opened
	dumpErr := coredump.Disable()

	flags := flag.NewFlagSet("pilot-decoder", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // what Parse says is in its error too
	keysPath := flags.String("decryption-keys-path", "", "")
	showVersion := flags.Bool("version", false, "")
	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Print(usage)
		return nil
	case err != nil:
		return exit.Usagef("%w (see \"pilot-decoder --help\")", err)
	case flags.NArg() == 1 && flags.Arg(0) == "version":
		*showVersion = true
	case flags.NArg() > 0:
		return exit.Usagef("unexpected argument %q", flags.Arg(0))
	}
	switch {
	case *showVersion:
		fmt.Println("pilot-decoder version", version.Text())
		return nil
	case payloadErr != nil:
		return payloadErr
	case dumpErr != nil:
		return fmt.Errorf("core dumps can't be disabled: %w", dumpErr)
	}
	for _, f := range []*os.File{os.Stdin, os.Stdout} {
		// Fewer switches between this and containerd. It may be no pipe, or
		// the machine may allow no more.
		unix.FcntlInt(f.Fd(), unix.F_SETPIPE_SZ, pipeSize)
	}
	var keys processor.Keys
	keys.Providers, keys.ProvidersErr = ocicryptclient.FromEnvironment(minigrpc.Call)
	return processor.RunStreamProcessor(context.Background(), payload, unwrapTimeout, processor.NewKeyDir(*keysPath, nil), keys, os.Stdin, os.Stdout)
}

// status returns the exit status for an error.
func status(err error) int {
	if errors.Is(err, processor.ErrDenied) {
		return exit.Denied
	}
	return exit.Status(err)
}

// oneLine returns the message of err in one line, with what to do about it
// if err does not say that.
func oneLine(err error) string {
	msg := strings.Join(strings.Fields(err.Error()), " ")
	if errors.Is(err, processor.ErrNoPayload) {
		msg += ": its client has to pass one, which CRI does with image_decryption.key_model = \"node\" and use_local_image_pull = true, and ctr-pilot's pull, run and import do"
	}
	return msg
}
