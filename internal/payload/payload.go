// Package payload passes a layer's descriptor and keys to the stream processors that
// decrypt it in containerd, as imgcrypt and containerd's CRI plugin do.
package payload

import (
	"context"
	"slices"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/imgcrypt/v2"
	"github.com/containerd/typeurl/v2"
	"github.com/containers/ocicrypt/config"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ids are the stream processors that get a payload: imgcrypt's, which has none for
// zstd, and one for that.
var ids = append(slices.Clone(imgcrypt.PayloadToolIDs), "io.containerd.ocicrypt.decoder.v1.tar.zstd")

// With returns an option of containerd's diff service that passes keys and the layer's
// descriptor to all stream processors.
func With(keys *config.DecryptConfig) diff.ApplyOpt {
	return func(_ context.Context, desc ocispec.Descriptor, c *diff.ApplyConfig) error {
		payload, err := typeurl.MarshalAny(&imgcrypt.Payload{DecryptConfig: *keys, Descriptor: desc})
		if err != nil {
			return err
		}
		if c.ProcessorPayloads == nil {
			c.ProcessorPayloads = make(map[string]typeurl.Any)
		}
		for _, id := range ids {
			c.ProcessorPayloads[id] = payload
		}
		return nil
	}
}
