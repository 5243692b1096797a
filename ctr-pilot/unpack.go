package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/cmd/ctr/commands"
	"github.com/containerd/containerd/v2/cmd/ctr/commands/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/platforms"
	"github.com/containers/ocicrypt/config"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/payload"
	"github.com/ctrlplane/pilot/processor"
)

// withPayload hands a layer's descriptor and the keys to the stream processor
// that decrypts the layer.
func withPayload(dc *config.DecryptConfig) diff.ApplyOpt {
	pass := payload.With(dc)
	return func(ctx context.Context, desc ocispec.Descriptor, c *diff.ApplyConfig) error {
		if !processor.IsEncrypted(desc.MediaType) {
			return nil
		}
		return pass(ctx, desc, c)
	}
}

// unpack unpacks an image for a platform, decrypting it.
func unpack(ctx context.Context, cmd *cli.Command, client *containerd.Client, img images.Image, p platforms.MatchComparer) (containerd.Image, error) {
	i := containerd.NewImageWithPlatform(client, img, p)
	encrypted, err := encryptedLayers(ctx, client, img.Target, p)
	if err != nil {
		return nil, err
	}
	dc, err := decryptConfig(cmd, encrypted)
	if err != nil {
		return nil, err
	}
	err = i.Unpack(ctx, cmd.String("snapshotter"), containerd.WithUnpackApplyOpts(withPayload(dc), diff.WithSyncFs(cmd.Bool("sync-fs"))))
	if err != nil && len(encrypted) > 0 && !strings.Contains(err.Error(), "pilot") {
		err = fmt.Errorf("%w (the image is encrypted: is there a stream processor for %s in containerd's configuration? \"pilot-decoder --help\" shows one)", err, encrypted[0].MediaType)
	}
	return i, err
}

// encryptedLayers returns the encrypted layers of an image for a platform.
func encryptedLayers(ctx context.Context, client *containerd.Client, target ocispec.Descriptor, p platforms.MatchComparer) ([]ocispec.Descriptor, error) {
	manifest, err := images.Manifest(ctx, client.ContentStore(), target, p)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(slices.Clone(manifest.Layers), func(l ocispec.Descriptor) bool {
		return !processor.IsEncrypted(l.MediaType)
	}), nil
}

// wrapPull makes ctr's pull fetch images itself, as its --local does, and
// unpack encrypted ones.
func wrapPull(c *cli.Command) {
	c.Flags = append(append(c.Flags, keyFlags()...), passwordFlag())
	c.Description += credentialsHelp + `
Encrypted images are decrypted while they are unpacked, by containerd, with the
keys given here or those of the node. All images are fetched as with --local, so
what containerd's transfer service is told about registries does not count.

Example:
   ctr-pilot images pull registry.example.com/app:encrypted
`
	c.Action = pull
}

func pull(ctx context.Context, cmd *cli.Command) error {
	ref := cmd.Args().First()
	if ref == "" || cmd.NArg() > 1 {
		return exit.Usagef("pull takes one image reference")
	}
	if cmd.Bool("all-platforms") && len(cmd.StringSlice("platform")) > 0 {
		return errBothPlatforms
	}
	if err := readPassword(cmd); err != nil {
		return err
	}
	return withClient(ctx, cmd, func(ctx context.Context, client *containerd.Client) error {
		conf, err := content.NewFetchConfig(ctx, cmd)
		if err != nil {
			return err
		}
		if !namesUser(cmd) {
			hosts, err := registryHosts(ctx, cmd)
			if err != nil {
				return err
			}
			conf.Resolver = docker.NewResolver(docker.ResolverOptions{Hosts: hosts})
		}
		if n := cmd.Int("max-concurrent-downloads"); n > 0 {
			conf.RemoteOpts = append(conf.RemoteOpts, containerd.WithMaxConcurrentDownloads(n))
		}
		img, err := content.Fetch(ctx, client, ref, conf)
		if err != nil {
			return err
		}
		wanted, err := wantedPlatforms(ctx, cmd, client, img.Target)
		if err != nil {
			return err
		}
		start := time.Now()
		for _, p := range wanted {
			fmt.Printf("unpacking %s %s...\n", platforms.FormatAll(p), img.Target.Digest)
			i, err := unpack(ctx, cmd, client, img, platforms.Only(p))
			if err != nil {
				return err
			}
			if cmd.Bool("print-chainid") {
				diffIDs, err := i.RootFS(ctx)
				if err != nil {
					return err
				}
				fmt.Printf("image chain ID: %s\n", identity.ChainID(diffIDs))
			}
		}
		fmt.Printf("done: %s\n", time.Since(start).Round(time.Millisecond))
		return nil
	})
}

// wantedPlatforms returns the platforms to unpack an image for.
func wantedPlatforms(ctx context.Context, cmd *cli.Command, client *containerd.Client, target ocispec.Descriptor) ([]ocispec.Platform, error) {
	if cmd.Bool("all-platforms") {
		all, err := images.Platforms(ctx, client.ContentStore(), target)
		return slices.DeleteFunc(all, func(p ocispec.Platform) bool { return p.OS == "unknown" }), err
	}
	wanted, err := platforms.ParseAll(cmd.StringSlice("platform"))
	if len(wanted) == 0 {
		wanted = []ocispec.Platform{platforms.DefaultSpec()}
	}
	return wanted, err
}

// wantedPlatform returns the one that --platform names, or the machine's own.
func wantedPlatform(cmd *cli.Command) (platforms.MatchComparer, error) {
	s := cmd.String("platform")
	if s == "" {
		return platforms.Default(), nil
	}
	spec, err := platforms.Parse(s)
	if err != nil {
		return nil, fmt.Errorf("--platform %s: %w", s, err)
	}
	return platforms.Only(spec), nil
}

// wrapUse makes one of ctr's commands that use an image check that the caller
// may decrypt it, and unpack it if it is not unpacked yet.
func wrapUse(c *cli.Command) {
	c.Flags = append(c.Flags, keyFlags()...)
	stock := c.Action
	c.Action = func(ctx context.Context, cmd *cli.Command) error {
		if !cmd.Bool("rootfs") && !cmd.IsSet("config") && cmd.Args().First() != "" {
			if err := prepareUse(ctx, cmd); err != nil {
				return err
			}
		}
		return stock(ctx, cmd)
	}
}

func prepareUse(ctx context.Context, cmd *cli.Command) error {
	client, ctx, cancel, err := commands.NewClient(ctx, cmd)
	if err != nil {
		return err
	}
	defer cancel()
	img, err := getImage(ctx, client, cmd.Args().First())
	if err != nil {
		return err
	}
	p, err := wantedPlatform(cmd)
	if err != nil {
		return err
	}
	encrypted, err := encryptedLayers(ctx, client, img.Target, p)
	if err != nil || len(encrypted) == 0 {
		return err
	}
	if !cmd.Bool("skip-decrypt-auth") {
		dc, err := decryptConfig(cmd, encrypted)
		if err != nil {
			return err
		}
		check, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		if err := image.CheckAccess(check, client.ContentStore(), img.Target, dc, p); err != nil {
			return fmt.Errorf("you are not authorized to use %s (--skip-decrypt-auth leaves that to the node): %w", img.Name, err)
		}
	}
	unpacked, err := containerd.NewImageWithPlatform(client, img, p).IsUnpacked(ctx, cmd.String("snapshotter"))
	if err != nil || unpacked {
		return err
	}
	_, err = unpack(ctx, cmd, client, img, p)
	return err
}
