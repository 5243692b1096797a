package main

import (
	"context"
	"slices"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/keyprovider/brokerconfig"
)

var decryptCommand = &cli.Command{
	Name:      "decrypt",
	Usage:     "decrypt an image",
	ArgsUsage: "<image> [<new name>]",
	Description: `Decrypts the layers of an image with the keys given, gpg's keyring, and key
providers, and gives the result the new name, or the image's own. An image that
was encrypted with ctr-pilot becomes what it was, byte for byte. Another image of the
new name is replaced only with --force, and a name by digest never is.
` + transportsHelp + keyProvidersHelp + `
Examples:
   ctr-pilot images decrypt --key key.pem:file=password.txt app:encrypted app:1
   ctr-pilot images decrypt docker://registry.example.com/app:enc oci:plain:1`,
	Flags:                     slices.Concat([]cli.Flag{forceFlag, jsonFlag()}, selectionFlags("decrypt"), keyFlags(), brokerconfig.Flags(), registryFlags()),
	DisableSliceFlagSeparator: true,
	Action: func(ctx context.Context, cmd *cli.Command) error {
		if err := checkRegistryFlags(cmd, "images named docker://…"); err != nil {
			return err
		}
		if err := readPassword(cmd); err != nil {
			return err
		}
		return crypt(ctx, cmd, "decrypt", func(ctx context.Context, at workplace, target ocispec.Descriptor, opts image.Options) (image.Result, error) {
			layers, err := layerDescriptors(ctx, at, target, opts)
			if err != nil {
				return image.Result{}, err
			}
			dc, err := decryptConfig(cmd, layers)
			if err != nil {
				return image.Result{}, err
			}
			return image.Decrypt(ctx, at, target, withProviders(cmd, dc), opts)
		})
	},
}
