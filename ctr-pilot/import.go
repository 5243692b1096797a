package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/cmd/ctr/commands"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/exit"
)

// wrapImport makes ctr's import read archives itself, as its --local does, and
// unpack encrypted images.
func wrapImport(c *cli.Command) {
	c.Flags = append(c.Flags, keyFlags()...)
	c.Description += `
Encrypted images are decrypted while they are unpacked, by containerd, with the
keys given here or those of the node. Archives are read as with --local.
`
	c.Action = importImages
}

func importImages(ctx context.Context, cmd *cli.Command) error {
	if cmd.NArg() != 1 {
		return exit.Usagef("import takes one archive, or - for standard input")
	}
	opts, err := importOptions(cmd)
	if err != nil {
		return err
	}
	p, err := wantedPlatform(cmd)
	if err != nil {
		return err
	}
	in := os.Stdin
	if name := cmd.Args().First(); name != "-" {
		if in, err = os.Open(name); err != nil {
			return err
		}
		defer in.Close()
	}
	return withClient(ctx, cmd, func(ctx context.Context, client *containerd.Client) error {
		list, err := client.Import(ctx, untilDone(ctx, in), opts...)
		if err != nil || cmd.Bool("no-unpack") {
			return err
		}
		for _, img := range list {
			if _, err := encryptedLayers(ctx, client, img.Target, p); errdefs.IsNotFound(err) {
				fmt.Printf("%s %s is not for this platform: not unpacked\n", img.Name, img.Target.Digest)
				continue
			}
			fmt.Printf("unpacking %s %s...\n", img.Name, img.Target.Digest)
			if _, err := unpack(ctx, cmd, client, img, p); err != nil {
				return err
			}
		}
		return nil
	})
}

// importOptions returns what ctr's flags mean.
func importOptions(cmd *cli.Command) ([]containerd.ImportOpt, error) {
	if cmd.Bool("discard-unpacked-layers") && cmd.Bool("no-unpack") {
		return nil, exit.Usagef("--discard-unpacked-layers and --no-unpack are mutually exclusive")
	}
	if cmd.Bool("skip-digest-for-named") && !cmd.Bool("digests") {
		return nil, exit.Usagef("--skip-digest-for-named needs --digests")
	}
	opts := []containerd.ImportOpt{containerd.WithAllPlatforms(cmd.Bool("all-platforms"))}
	prefix := cmd.String("base-name")
	if prefix != "" {
		opts = append(opts, containerd.WithImageRefTranslator(archive.FilterRefPrefix(prefix)))
	} else {
		prefix = "import-" + time.Now().Format(time.DateOnly)
		opts = append(opts, containerd.WithImageRefTranslator(archive.AddRefPrefix(prefix)))
	}
	if cmd.Bool("digests") {
		opts = append(opts, containerd.WithDigestRef(archive.DigestTranslator(prefix)))
	}
	if cmd.Bool("skip-digest-for-named") {
		opts = append(opts, containerd.WithSkipDigestRef(func(name string) bool { return name != "" }))
	}
	if name := cmd.String("index-name"); name != "" {
		opts = append(opts, containerd.WithIndexName(name))
	}
	if cmd.Bool("compress-blobs") {
		opts = append(opts, containerd.WithImportCompression())
	}
	if cmd.Bool("discard-unpacked-layers") {
		opts = append(opts, containerd.WithDiscardUnpackedLayers())
	}
	if labels := cmd.StringSlice("label"); len(labels) > 0 {
		opts = append(opts, containerd.WithImageLabels(commands.LabelArgs(labels)))
	}
	if s := cmd.String("platform"); s != "" {
		spec, err := platforms.Parse(s)
		if err != nil {
			return nil, fmt.Errorf("--platform %s: %w", s, err)
		}
		opts = append(opts, containerd.WithImportPlatform(platforms.OnlyStrict(spec)))
	}
	return opts, nil
}

// untilDone reads from in until ctx is done, even if nothing comes from there.
func untilDone(ctx context.Context, in io.Reader) io.Reader {
	r, w := io.Pipe()
	go func() {
		_, err := io.Copy(w, in)
		w.CloseWithError(err)
	}()
	context.AfterFunc(ctx, func() { w.CloseWithError(ctx.Err()) })
	return r
}
