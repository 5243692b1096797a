package image

import (
	"bytes"
	"io"
	"slices"

	imgcrypt "github.com/containerd/imgcrypt/v2/images/encryption"
	"github.com/containers/ocicrypt"
	"github.com/containers/ocicrypt/config"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// imgcryptTypes are the types of layers that imgcrypt encrypts.
var imgcryptTypes = []string{
	ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd, dockerGzip, "application/vnd.docker.image.rootfs.diff.tar",
}

// checkPeers has ocicrypt decrypt each layer, and imgcrypt the whole image where it
// is one that it knows, and the reverse.
func (c *trial) checkPeers(e *export, result Result) {
	i := slices.IndexFunc(c.to, func(r recipient) bool { return r.kek == "" })
	if i < 0 || len(c.to) > 8 {
		return // ocicrypt has no key provider here
	}
	dc := &config.DecryptConfig{Parameters: c.to[i].dc}
	for _, desc := range e.encrypted {
		r, _, err := ocicrypt.DecryptLayer(dc, bytes.NewReader(e.blobs[desc.Digest]), desc, false)
		if err != nil {
			c.problem("ocicrypt does not decrypt a layer", "%s for %s: %v", desc.MediaType, c.to[i], err)
			continue
		}
		b, err := io.ReadAll(r)
		if d := digest.FromBytes(b); err != nil || d != c.plain[desc.Digest] {
			c.problem("ocicrypt decrypts to something else", "%s for %s: %s, not %s: %v", desc.MediaType, c.to[i], d, c.plain[desc.Digest], err)
		}
	}
	known := true
	c.manifests(func(_ ocispec.Descriptor, m ocispec.Manifest) {
		known = known && (m.Config.MediaType == ocispec.MediaTypeImageConfig || m.Config.MediaType == dockerConfig) && len(m.Config.Data) == 0
		for _, l := range m.Layers {
			known = known && slices.Contains(imgcryptTypes, l.MediaType)
		}
	})
	for _, feature := range []string{"absent manifest", "absent layer", "absent config", "nested index", "entry of another type", "old artifact", "unusual manifest type", "stale annotations of encryption"} {
		known = known && !c.Features[feature]
	}
	if !known || result.Layers == 0 || len(c.opts.Layers)+len(c.opts.Platforms) > 0 || slices.ContainsFunc(c.to, func(r recipient) bool { return r.kek != "" }) {
		return
	}
	all := func(ocispec.Descriptor) bool { return true }
	cc := &config.CryptoConfig{EncryptConfig: &config.EncryptConfig{Parameters: encryptConfig(c.to).Parameters}, DecryptConfig: dc}
	theirs, _, err := imgcrypt.DecryptImage(c.s.ctx, c.s, result.Target, cc, all)
	if err != nil {
		c.problem("imgcrypt does not decrypt ours", "%v", err)
		return
	}
	c.sameLayers("imgcrypt decrypts ours to something else", theirs)
	cc.EncryptConfig.DecryptConfig = config.DecryptConfig{}
	theirs, _, err = imgcrypt.EncryptImage(c.s.ctx, c.s, c.Target, cc, all)
	if err != nil {
		c.problem("imgcrypt does not encrypt what we do", "%v", err)
		return
	}
	ours, err := Decrypt(c.s.ctx, c.s, theirs, processor.Keys{Private: dc}, Options{})
	if err != nil {
		c.problem("imgcrypt's is not decrypted", "%v", err)
		return
	}
	c.sameLayers("imgcrypt's is decrypted to something else", ours.Target)
}

func (c *trial) sameLayers(class string, got ocispec.Descriptor) {
	a, err := Layers(c.s.ctx, c.s, got, Options{})
	b, err2 := Layers(c.s.ctx, c.s, c.Target, Options{})
	if err != nil || err2 != nil || len(a) != len(b) {
		c.problem(class, "%d layers, not %d: %v, %v", len(a), len(b), err, err2)
		return
	}
	for i := range a {
		if a[i].Descriptor.Digest != b[i].Descriptor.Digest {
			c.problem(class, "layer %d is %s, not %s", i, a[i].Descriptor.Digest, b[i].Descriptor.Digest)
		}
	}
}
