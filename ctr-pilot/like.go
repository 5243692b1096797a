package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/progress"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/image/transport"
	"github.com/ctrlplane/pilot/processor"
)

var likeFlag = &cli.StringFlag{
	Name:  "like",
	Usage: "earlier encrypted `IMAGE`, whose layers are taken over where they did not change, or none; by default the image that --force replaces",
}

// likeName returns the image that --like names, or nil, and whether the flag rules out
// every image.
func likeName(cmd *cli.Command) (name *transport.Name, none bool, err error) {
	text := cmd.String("like")
	if text == "" || text == "none" {
		return nil, text == "none", nil
	}
	n, err := parseName(text)
	if err != nil {
		return nil, false, fmt.Errorf("--like: %w", err)
	}
	return &n, false, nil
}

// earlierImage is an encrypted image that the new one may share layers with. Its Like is
// nil if there is none.
type earlierImage struct {
	*image.Like
	source transport.Source
}

func (e earlierImage) close() {
	if e.source != nil {
		_ = e.source.Close() // it was only read
	}
}

// earlier opens the image that --like names, or replaced, which may be nil. take brings its
// blobs to where the new image is written.
func (p *places) earlier(ctx context.Context, replaced *transport.Name, take func(context.Context, content.Provider, ocispec.Descriptor) error) (earlierImage, error) {
	name, none, err := likeName(p.cmd)
	given := name != nil
	if !given {
		name = replaced
	}
	if err != nil || none || name == nil {
		return earlierImage{}, err
	}
	source, layers, err := p.encryptedLayersOf(ctx, *name)
	switch {
	case ctx.Err() != nil:
		return earlierImage{}, ctx.Err()
	case err != nil && given && !errdefs.IsNotFound(err):
		return earlierImage{}, fmt.Errorf("--like %s: %w (--like none does without)", name, err)
	case err == nil && len(layers) == 0 && given:
		err = errors.New("it has no encrypted layers")
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "ctr-pilot: warning: no layer is taken over from %s: %s\n", name, shownText(err.Error()))
	}
	if len(layers) == 0 {
		return earlierImage{source: source}, nil
	}
	return earlierImage{&image.Like{Layers: layers, Take: func(ctx context.Context, blob ocispec.Descriptor) error {
		return take(ctx, source, blob)
	}}, source}, nil
}

// encryptedLayersOf opens an image and returns its encrypted layers.
func (p *places) encryptedLayersOf(ctx context.Context, n transport.Name) (transport.Source, []ocispec.Descriptor, error) {
	source, err := p.source(ctx, n)
	if err != nil {
		return nil, nil, err
	}
	target, err := source.Resolve(ctx)
	var layers []ocispec.Descriptor
	if err == nil {
		layers, err = layerDescriptors(ctx, transport.NewPair(source, nil), target, image.Options{})
	}
	if err != nil {
		return nil, nil, errors.Join(err, source.Close())
	}
	return source, slices.DeleteFunc(layers, func(l ocispec.Descriptor) bool { return !processor.IsEncrypted(l.MediaType) }), nil
}

// printNotReused prints why layers of the earlier image were encrypted anew.
func printNotReused(reused image.Reused) {
	if len(reused.Failed) == 0 {
		return
	}
	more := ""
	if n := len(reused.Failed) - 1; n > 0 {
		more = fmt.Sprintf(" (and %d more)", n)
	}
	fmt.Fprintf(os.Stderr, "ctr-pilot: encrypted anew: %s%s\n", shownText(reused.Failed[0].Error()), more)
}

// reusedText says how much was taken over.
func reusedText(reused image.Reused) string {
	if reused.Layers == 0 {
		return ""
	}
	return fmt.Sprintf(", %d of them taken over with %v", reused.Layers, progress.Bytes(reused.Bytes))
}
