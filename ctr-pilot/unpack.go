package main

import (
	"context"
	"fmt"
	"slices"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/imgcrypt/v2"
	"github.com/containerd/platforms"
	"github.com/containerd/typeurl/v2"
	"github.com/containers/ocicrypt/config"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/processor"
)

// payloadIDs are the stream processors that get the keys: imgcrypt's, which
// has none for zstd, and one for that.
var payloadIDs = append(slices.Clone(imgcrypt.PayloadToolIDs), "io.containerd.ocicrypt.decoder.v1.tar.zstd")

// withPayload hands a layer's descriptor and the keys to the stream processor
// that decrypts the layer.
func withPayload(dc *config.DecryptConfig) diff.ApplyOpt {
	return func(_ context.Context, desc ocispec.Descriptor, c *diff.ApplyConfig) error {
		if !processor.IsEncrypted(desc.MediaType) {
			return nil
		}
		payload, err := typeurl.MarshalAny(&imgcrypt.Payload{DecryptConfig: *dc, Descriptor: desc})
		if err != nil {
			return err
		}
		if c.ProcessorPayloads == nil {
			c.ProcessorPayloads = make(map[string]typeurl.Any)
		}
		for _, id := range payloadIDs {
			c.ProcessorPayloads[id] = payload
		}
		return nil
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
