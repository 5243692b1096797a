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

	"github.com/ctrlplane/pilot/internal/coredump"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/ocicryptclient"
	"github.com/ctrlplane/pilot/internal/version"
	"github.com/ctrlplane/pilot/processor"
)

// unwrapWithin bounds the wait for the payload and for the layer key.
const unwrapWithin = 40 * time.Second

// pipeSize is what the pipes to and from containerd are enlarged to, in bytes:
// what Linux lets everybody have.
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

It reads the layer from standard input, what tells it how to decrypt from file
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
		return exit.Usagef("it takes no argument, and got %q", flags.Arg(0))
	}
	switch {
	case *showVersion:
		fmt.Println("pilot-decoder version", version.Version)
		return nil
	case payloadErr != nil:
		return payloadErr
	case dumpErr != nil:
		return fmt.Errorf("core dumps can't be disabled: %w", dumpErr)
	}
	return decrypt(context.Background(), payload, processor.NewKeyDir(*keysPath, nil))
}

// decrypt decrypts the layer on standard input.
func decrypt(ctx context.Context, payload *os.File, keys *processor.KeyDir) error {
	unwrapCtx, cancel := context.WithTimeout(ctx, unwrapWithin)
	defer cancel()
	p, err := processor.ReadPayload(unwrapCtx, payload)
	if err != nil {
		return err
	}
	payload.Close()

	layer := fmt.Sprintf("layer %s", p.Descriptor.Digest)
	key, err := keys.Unwrap(unwrapCtx, &p.DecryptConfig, p.Descriptor)
	if err != nil {
		return fmt.Errorf("%s: %w", layer, err)
	}
	defer key.Clear()
	for _, f := range []*os.File{os.Stdin, os.Stdout} {
		// Fewer switches between this and containerd. It may be no pipe, or
		// the machine may allow no more.
		unix.FcntlInt(f.Fd(), unix.F_SETPIPE_SZ, pipeSize)
	}
	d, err := processor.NewDecrypter(os.Stdin, key)
	if err != nil {
		return fmt.Errorf("%s: %w", layer, err)
	}
	if _, err := d.WriteTo(os.Stdout); err != nil {
		return fmt.Errorf("%s: %w", layer, err)
	}
	return nil
}

// status returns the exit status for an error.
func status(err error) int {
	if errors.Is(err, ocicryptclient.ErrDenied) {
		return exit.Denied
	}
	return exit.Status(err)
}

// oneLine returns the message of err in one line, with what to do about it
// where that is not said in err.
func oneLine(err error) string {
	msg := strings.Join(strings.Fields(err.Error()), " ")
	if errors.Is(err, processor.ErrNoPayload) {
		msg += ": its client has to pass one, which CRI does with image_decryption.key_model = \"node\" and use_local_image_pull = true, and ctr-pilot's pull, run and import do"
	}
	return msg
}
