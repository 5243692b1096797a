package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/image/transport"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/keyprovider/brokerconfig"
)

var encryptCommand = &cli.Command{
	Name:      "encrypt",
	Usage:     "encrypt an image",
	ArgsUsage: "<image> [<new name>]",
	Description: `Encrypts the layers of an image for recipients, and gives the result the new
name, or the image's own. Another image of that name is replaced only with --force,
and a name by digest, NAME@sha256:…, never is. A layer that is encrypted already is
not touched: the recipients are added to those that it has.

Blobs of every media type are encrypted, and SBOMs and provenance too. What stays
readable is named, and is an error before anything is encrypted, unless
--allow-plain accepts it or it is not selected by --layer and --platform. Platforms
whose content is not here are left out of the new image. An image's configuration
is readable in every encrypted image: everything that handles images has to read it.

An image that BuildKit built on an encrypted one has the layers of that without
their keys. --keys-from names the image that it was built on, in containerd or in
its registry. Each key is checked against its layer before it is put back.

--layer and --all-but-base leave the other layers readable.

Layers that an earlier encrypted image has too, by the digest of the plain layer, are
taken over as they are there, if their keys unwrap here, and wrapped for the new
recipients alone. A rebuilt image then uploads what changed, and nodes download no
more. The earlier image is the one that --like names, or that --force replaces.

Layers that are eStargz or zstd:chunked are sealed for lazy pulling, and "not lazy"
says which could not be, and why. --estargz converts the others before it encrypts
them. The plain image is another one then, by which decrypting gives it back:
signatures that were made of it before don't fit. Converted layers are in temporary
files without names (in TMPDIR) until they are encrypted.
` + transportsHelp + keyProvidersHelp + `
Recipients:
   provider:NAME:PARAMETER   a key provider; for pilot, a KEK, or a recipient of age
   hpke:FILE                 the public half of a KEK, from "copilot keys public"
   coco:KEK                  a KEK, for guests of Confidential Containers; or a URI kbs:///…
   jwe:FILE                  a public key
   pkcs7:FILE                an X.509 certificate
   pgp:NAME                  a name or mail address in gpg's keyring
   pkcs11:FILE               a public key, or a YAML file of a key in an HSM

Examples:
   ctr-pilot images encrypt --recipient provider:pilot:team-a app:1 app:encrypted
   ctr-pilot images encrypt --broker https://copilot.example.com:8443 \
      --recipient provider:pilot:team-a oci:app docker://registry.example.com/app:enc
   ctr-pilot images encrypt --recipient provider:pilot:team-a \
      --keys-from registry.example.com/base:1 app:built app:encrypted
   ctr-pilot images encrypt --recipient provider:pilot:team-a \
      oci-archive:app.tar docker://registry.example.com/app:enc
   ctr-pilot images encrypt --estargz --recipient provider:pilot:team-a \
      docker://registry.example.com/app:1 docker://registry.example.com/app:1-enc
   ctr-pilot images encrypt --recipient provider:pilot:team-a \
      --like docker://registry.example.com/app:1-enc \
      oci:app docker://registry.example.com/app:2-enc`,
	Flags: slices.Concat([]cli.Flag{
		&cli.StringSliceFlag{Name: "recipient", Usage: "`RECIPIENT` that may decrypt the image; may be repeated"},
		&cli.StringSliceFlag{Name: "keys-from", Usage: "`IMAGE` that has the keys of layers that are encrypted and lost them; may be repeated"},
		likeFlag,
		&cli.BoolFlag{Name: "estargz", Usage: "convert layers to eStargz first, so that nodes can pull the image lazily"},
		forceFlag,
		allButBaseFlag,
	}, plainFlags(), selectionFlags("encrypt"), keyFlags(), brokerconfig.Flags(), registryFlags()),
	DisableSliceFlagSeparator: true,
	Action: func(ctx context.Context, cmd *cli.Command) error {
		if !cmd.IsSet("keys-from") && !cmd.IsSet("all-but-base") && !cmd.IsSet("like") {
			if err := checkRegistryFlags(cmd, "images named docker://…, --keys-from, --all-but-base and --like"); err != nil {
				return err
			}
		}
		if err := readPassword(cmd); err != nil {
			return err
		}
		return crypt(ctx, cmd, "encrypt", func(ctx context.Context, at workplace, target ocispec.Descriptor, opts image.Options) (image.Result, error) {
			var err error
			if opts.Base, err = baseLayers(ctx, at, cmd); err != nil {
				return image.Result{}, err
			}
			layers, err := layerDescriptors(ctx, at, target, opts)
			if err != nil {
				return image.Result{}, err
			}
			to, err := newRecipients(cmd, keyArguments(cmd), layers)
			if err != nil {
				return image.Result{}, err
			}
			if opts.KeysFrom, err = keysFrom(ctx, at, cmd); err != nil {
				return image.Result{}, err
			}
			like, err := at.earlier(ctx)
			if err != nil {
				return image.Result{}, err
			}
			defer like.close()
			opts.Like = like.Like
			opts.AllowPlain, opts.KeepAbsent = cmd.Bool("allow-plain"), cmd.Bool("keep-absent")
			opts.Attestations = image.Attestations(cmd.String("attestations"))
			if cmd.Bool("estargz") {
				if err := image.Check(ctx, at.Store, target, to, opts); err != nil {
					return image.Result{}, err
				}
				if target, err = at.convert(ctx, opts); err != nil {
					return image.Result{}, err
				}
			}
			return image.Encrypt(ctx, at.Store, target, to, opts)
		})
	},
}

type cryptFunc func(context.Context, workplace, ocispec.Descriptor, image.Options) (image.Result, error)

// crypt encrypts or decrypts the image that the command names, with do.
func crypt(ctx context.Context, cmd *cli.Command, verb string, do cryptFunc) error {
	name, toName := cmd.Args().First(), cmd.Args().Get(1)
	if name == "" || cmd.NArg() > 2 {
		return exit.Usagef("%s takes the name of an image and a new name, and got %d arguments", verb, cmd.NArg())
	}
	if toName == "" {
		toName = name
	}
	if err := checkKeyProviders(cmd); err != nil {
		return err
	}
	opts, err := selection(cmd)
	if err != nil {
		return err
	}
	from, err := parseName(name)
	if err != nil {
		return err
	}
	to, err := parseName(toName)
	if err != nil {
		return err
	}
	if verb == "encrypt" {
		// Before anything is opened, and found to be missing or taken.
		if err := checkRecipients(cmd.StringSlice("recipient")); err != nil {
			return err
		}
	}
	names := []transport.Name{from, to}
	if like, _, err := likeName(cmd); err != nil {
		return err
	} else if like != nil {
		names = append(names, *like)
	}
	return withPlaces(ctx, cmd, names, func(ctx context.Context, p *places) error {
		if err := p.crypt(ctx, verb, from, to, toName, opts, do); err != nil {
			return fmt.Errorf("%s %s: %w", verb, name, err)
		}
		return nil
	})
}

var errNothingEncrypted = errors.New("no layer was encrypted: it has none, or the flags leave out all that it has")
