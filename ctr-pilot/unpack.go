package main

import (
	"context"
	"fmt"
	"slices"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/containers/ocicrypt/config"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v3"

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
	if errdefs.IsUnknown(err) && len(encrypted) > 0 {
		// pilot's differ classifies its errors, and stream processors, or containerd
		// without one, do not.
		err = fmt.Errorf("%w (the image is encrypted: \"pilot node doctor\" examines how this node decrypts it; \"pilot-decoder --help\" shows the stream processor for %s)", err, encrypted[0].MediaType)
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
