// Package imagekeys finds which KEKs a container of an image needs.
//
// containerd shares unpacked layers by their diff IDs, over images and namespaces, and does
// not fetch a layer that it has unpacked already. So an image of anybody's whose
// configuration names the diff IDs of another's encrypted image gets its files without a
// key. What a container needs is therefore found by the diff IDs of its image, in the record
// of what was decrypted on this node: package layerkeys.
package imagekeys

import (
	"context"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/opencontainers/go-digest"

	"github.com/ctrlplane/pilot/internal/layerkeys"
	"github.com/ctrlplane/pilot/internal/mustencrypt"
	"github.com/ctrlplane/pilot/processor"
)

// Image is an image of a containerd's.
type Image struct {
	// Name is the image's as the container runtime has it, such as
	// docker.io/library/app:1, or "" if Digest is set.
	Name string
	// Digest is that of its manifest or index, or "": the one that Name stands for now.
	Digest digest.Digest
}

// KEK is a version of a KEK. Version is 0 where the broker has no versions.
type KEK = layerkeys.KEK

// Layer is one way in which a container has to be allowed to use a layer. A diff ID can have
// several, all of which count.
type Layer struct {
	DiffID digest.Digest
	// KEKs open the layer: any one of them is enough.
	KEKs []KEK
	// Other reports that a key opens it that is not a KEK of the broker's, and would be
	// enough too.
	Other bool
	// Why says why the layer needs a key although the image does not say so, and what to do
	// about that. It is "" where the image itself is encrypted for these KEKs.
	Why string
}

// Config says how a [Resolver] works.
type Config struct {
	Client *containerd.Client
	Record *layerkeys.Record
	// Keys and DecryptionKeysPath are what layer keys are unwrapped with, as those of the
	// differ.
	Keys               processor.Keys
	DecryptionKeysPath string
	// Rules returns those of the setting must-be-encrypted. May be nil: none.
	Rules func() mustencrypt.Rules
}

// Resolver finds which KEKs containers need. It is safe for concurrent use.
type Resolver struct {
	conf Config
	keys *processor.KeyDir
	now  func() time.Time
}

// New returns a Resolver.
func New(conf Config) *Resolver {
	return &Resolver{conf: conf, keys: processor.NewKeyDir(conf.DecryptionKeysPath, nil), now: time.Now}
}

// Needs returns what a container of an image in containerd's namespace ns has to be allowed
// to use: all of the layers that it returns, and none for plain images. The error is one of
// errdefs: ErrNotFound if there is no such image. A caller that gets an error must not start
// the container.
func (r *Resolver) Needs(ctx context.Context, ns string, image Image) ([]Layer, error) {
	return nil, nil
}

// CheckEncrypted returns an error if the setting must-be-encrypted is for an image in
// containerd's namespace ns, and not all its layers are encrypted as a rule says. The error
// is errdefs.ErrFailedPrecondition, and says which rule and what to do. names are further
// names under which the image was asked for, such as the one in a pod's specification.
func (r *Resolver) CheckEncrypted(ctx context.Context, ns string, image Image, names ...string) error {
	return nil
}
