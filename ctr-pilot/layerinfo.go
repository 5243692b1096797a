package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/containerd/imgcrypt/v2/images/encryption/parsehelpers"
	"github.com/containerd/platforms"
	"github.com/containers/ocicrypt"
	"github.com/opencontainers/go-digest"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/image/transport"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/keyprovider/agekey"
	"github.com/ctrlplane/pilot/processor"
)

var layerinfoCommand = &cli.Command{
	Name:      "layerinfo",
	Usage:     "show how an image's layers are encrypted, and for whom",
	ArgsUsage: "<image>",
	Description: `Lists the layers of an image, of whatever media type, with the ways in which their
keys are wrapped, and for whom, as far as that can be seen without a key. Standard error
shows whether all of them are encrypted, and names what is not or can't be seen here.

An image's configuration, which is never encrypted, does not count.
` + transportsHelp + `
Examples:
   ctr-pilot images layerinfo app:encrypted
   ctr-pilot images layerinfo --require-encrypted --json app:encrypted
   ctr-pilot images layerinfo docker://registry.example.com/app:enc`,
	Flags: slices.Concat(selectionFlags("show"), registryFlags(), []cli.Flag{
		jsonFlag(),
		&cli.BoolFlag{Name: "require-encrypted", Usage: "exit with status 3 unless the whole image is encrypted"},
		&cli.StringFlag{Name: "gpg-homedir", Usage: "gpg's `DIRECTORY` (default: ~/.gnupg)"},
		&cli.StringFlag{Name: "gpg-version", Usage: "`VERSION` of gpg, v1 or v2 (default: what is installed)"},
		&cli.BoolFlag{Name: "n", Usage: "show the key IDs of pgp recipients, not their names"},
	}),
	DisableSliceFlagSeparator: true,
	Action: func(ctx context.Context, cmd *cli.Command) error {
		if cmd.NArg() != 1 {
			return exit.Usagef("layerinfo takes the name of one image")
		}
		opts, err := selection(cmd)
		if err != nil {
			return err
		}
		if err := checkRegistryFlags(cmd, "an image named docker://…"); err != nil {
			return err
		}
		if err := readPassword(cmd); err != nil {
			return err
		}
		layers, plain, err := inspect(ctx, cmd, opts)
		if err != nil {
			return err
		}
		notEncrypted := image.NotEncrypted(plain)
		var gpg ocicrypt.GPGClient
		if !cmd.Bool("n") {
			// Without gpg, key IDs are shown.
			gpg, _ = parsehelpers.CreateGPGClient(keyArguments(cmd))
		}
		withoutKey := 0
		rows := make([]layerInfo, len(layers))
		for i, l := range layers {
			rows[i] = newLayerInfo(l, gpg)
			if rows[i].Encrypted && len(rows[i].Encryption) == 0 {
				withoutKey++
			}
		}
		if withoutKey > 0 {
			fmt.Fprintf(os.Stderr, "ctr-pilot: warning: %d layers are encrypted and have no key, as BuildKit leaves those of an encrypted base image: "+
				"nobody can decrypt them until \"images encrypt --keys-from BASE\" puts the keys back\n", withoutKey)
		}
		if cmd.Bool("json") {
			err = printJSON(imageInfo{len(notEncrypted) == 0, rows, plain})
		} else {
			err = printLayers(rows, notEncrypted)
		}
		if err == nil && len(notEncrypted) > 0 && cmd.Bool("require-encrypted") {
			err = exit.DeniedError(fmt.Errorf("%s is not fully encrypted", cmd.Args().First()))
		}
		return err
	},
}

// inspect returns the layers of the image that the command names, and what is readable
// in it.
func inspect(ctx context.Context, cmd *cli.Command, opts image.Options) (layers []image.Layer, plain []image.Plain, err error) {
	name, err := parseName(cmd.Args().First())
	if err != nil {
		return nil, nil, err
	}
	return layers, plain, withPlaces(ctx, cmd, []transport.Name{name}, func(ctx context.Context, p *places) (err error) {
		defer func() {
			if err != nil {
				err = fmt.Errorf("layerinfo %s: %w", cmd.Args().First(), err)
			}
		}()
		source, err := p.source(ctx, name)
		if err != nil {
			return err
		}
		defer source.Close()
		target, err := source.Resolve(ctx)
		if err != nil {
			return err
		}
		store := transport.NewPair(source, nil)
		if layers, err = image.Layers(ctx, store, target, opts); err != nil {
			return err
		}
		plain, err = image.Inspect(ctx, store, target, opts)
		return err
	})
}

// printLayers prints a table of the layers, in the columns of imgcrypt's, which its
// users' scripts read, and on standard error what is not encrypted.
func printLayers(rows []layerInfo, notEncrypted []image.Plain) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "#\tDIGEST\tPLATFORM\tSIZE\tENCRYPTION\tRECIPIENTS")
	for _, r := range rows {
		encryption := shown(strings.Join(r.Encryption, ","))
		if r.Encrypted && len(r.Encryption) == 0 {
			encryption = "NO KEY"
		}
		fmt.Fprintf(w, "%d\t%s\t%s\t%d\t%s\t%s\n", r.Layer, shown(r.Digest.String()), shown(r.Platform), r.Size,
			encryption, shown(strings.Join(short(r.Recipients), ", ")))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	lazy := 0
	for _, r := range rows {
		if r.Lazy {
			lazy++
		}
	}
	if lazy > 0 {
		fmt.Fprintf(os.Stderr, "lazy: %d of %d layers are sealed for lazy pulling\n", lazy, len(rows))
	}
	if len(notEncrypted) == 0 {
		fmt.Fprintln(os.Stderr, "fully encrypted, except configurations, which are never encrypted")
		return nil
	}
	fmt.Fprintln(os.Stderr, "not fully encrypted:")
	for _, p := range notEncrypted {
		fmt.Fprintln(os.Stderr, "  "+p.String())
	}
	return nil
}

// short returns recipients without the ends of those of age that are long.
func short(recipients []string) []string {
	list := make([]string, len(recipients))
	for i, r := range recipients {
		list[i] = agekey.Shown(r)
	}
	return list
}

// imageInfo is the JSON of layerinfo.
type imageInfo struct {
	// FullyEncrypted is true if Plain has only configurations.
	FullyEncrypted bool          `json:"fullyEncrypted"`
	Layers         []layerInfo   `json:"layers"`
	Plain          []image.Plain `json:"plain"`
}

// layerInfo is a row of layerinfo, and its JSON.
type layerInfo struct {
	Layer      int           `json:"layer"` // from 0
	Digest     digest.Digest `json:"digest"`
	MediaType  string        `json:"mediaType"`
	Platform   string        `json:"platform,omitempty"`
	Size       int64         `json:"size"`
	Encrypted  bool          `json:"encrypted"`
	Encryption []string      `json:"encryption"` // ways in which the layer key is wrapped
	Recipients []string      `json:"recipients"`
	// Lazy says that the layer has a seal for lazy pulling, which only its key can show to
	// be right.
	Lazy bool `json:"lazy"`
}

func newLayerInfo(l image.Layer, gpg ocicrypt.GPGClient) layerInfo {
	info := layerInfo{
		Layer: l.Index, Digest: l.Descriptor.Digest, MediaType: l.Descriptor.MediaType, Size: l.Descriptor.Size,
		Encrypted: processor.IsEncrypted(l.Descriptor.MediaType), Encryption: []string{}, Recipients: []string{},
		Lazy: image.IsLazy(l.Descriptor),
	}
	if l.Platform != nil {
		info.Platform = platforms.FormatAll(*l.Platform)
	}
	var keyIDs []string
	for _, r := range image.Recipients(l.Descriptor) {
		if !slices.Contains(info.Encryption, r.Scheme) {
			info.Encryption = append(info.Encryption, r.Scheme)
		}
		if r.KeyID != "" {
			keyIDs = append(keyIDs, r.KeyID)
			continue
		}
		info.Recipients = append(info.Recipients, recipientName(r))
	}
	if gpg != nil && len(keyIDs) > 0 {
		keyIDs = gpg.ResolveRecipients(keyIDs)
	}
	info.Recipients = append(info.Recipients, keyIDs...)
	slices.Sort(info.Encryption)
	slices.Sort(info.Recipients)
	return info
}

// recipientName returns what a row shows of a recipient that is not of pgp.
func recipientName(r image.Recipient) string {
	switch {
	case r.Original:
		return "[KEK not named]"
	case r.KEK == "":
		return "[" + r.Scheme + "]"
	case r.Version == 0:
		return r.KEK
	}
	return fmt.Sprintf("%s@%d", r.KEK, r.Version)
}
