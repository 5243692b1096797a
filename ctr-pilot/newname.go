package main

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v3"
)

// forceFlag is for commands that give their result a name.
var forceFlag = &cli.BoolFlag{
	Name:  "force",
	Usage: "replace an image that has the new name, or that changed while the command ran",
}

// newName is the name that a command gives its result, another or that of the image
// that it was made from.
type newName struct {
	store images.Store
	from  images.Image
	name  string
	force bool
}

// set gives the name to target. Without force it does not replace an image that got the
// name since the command began.
func (n newName) set(ctx context.Context, target ocispec.Descriptor) error {
	img := n.from
	if n.name != n.from.Name {
		img.Name, img.Target = n.name, target
		_, err := n.store.Create(ctx, img)
		if errdefs.IsAlreadyExists(err) && n.force {
			_, err = n.store.Update(ctx, img, "target")
		}
		return err
	}
	now, err := n.store.Get(ctx, n.name)
	if n.force && errdefs.IsNotFound(err) {
		img.Target = target
		_, err = n.store.Create(ctx, img)
		return err
	}
	if err != nil {
		return err
	}
	if now.Target.Digest != img.Target.Digest && !n.force {
		return fmt.Errorf("it was changed to %s while this command ran: try again, or replace that with --force", now.Target.Digest)
	}
	now.Target = target
	_, err = n.store.Update(ctx, now, "target")
	return err
}
