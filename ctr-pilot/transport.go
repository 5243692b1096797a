package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/image/registry"
	"github.com/ctrlplane/pilot/image/transport"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/localstore"
)

const transportsHelp = `
Images are in containerd, or where their names say, spelled as skopeo spells them:

   docker://REGISTRY/REPOSITORY:TAG   a registry
   oci:DIRECTORY[:NAME]               a directory with the OCI image layout
   oci-archive:FILE[:NAME]            the same in a tar archive
   docker-archive:FILE[:NAME]         what "docker save" writes, to be read only
   containerd:NAME                    containerd, as a name without any of these
`

// parseName reads the name of an image, with a transport or of one in containerd.
func parseName(s string) (transport.Name, error) {
	n, err := transport.Parse(s)
	if err != nil {
		err = exit.Usagef("%w", err)
	}
	return n, err
}

// workplace is where an image is worked on.
type workplace struct {
	image.Store
	// layersOf returns the layers of another image, of which the manifests are read.
	layersOf func(ctx context.Context, name string) ([]ocispec.Descriptor, error)
	// earlier opens the encrypted image that the new one may share layers with. The
	// caller closes it.
	earlier func(ctx context.Context) (earlierImage, error)
}

// places opens images by their names.
type places struct {
	cmd    *cli.Command
	client *containerd.Client // nil if no image is in containerd
	hosts  docker.RegistryHosts
}

// withPlaces calls do with what it takes to open images of these names, until a signal.
func withPlaces(ctx context.Context, cmd *cli.Command, names []transport.Name, do func(context.Context, *places) error) error {
	if !cmd.Bool("debug") {
		// containerd's code logs which hosts it tries. What matters of that is in errors.
		if err := log.SetLevel("error"); err != nil {
			return err
		}
	}
	hosts, err := registryHosts(ctx, cmd)
	if err != nil {
		return err
	}
	for _, n := range names {
		if n.Transport == transport.Containerd {
			return withClient(ctx, cmd, func(ctx context.Context, client *containerd.Client) error {
				return do(ctx, &places{cmd, client, hosts})
			})
		}
	}
	ctx, stop := untilSignal(ctx)
	defer stop()
	return do(ctx, &places{cmd, nil, hosts})
}

func (p *places) source(ctx context.Context, n transport.Name) (transport.Source, error) {
	if n.Transport == transport.Containerd {
		return p.inContainerd(n), nil
	}
	return transport.OpenSource(ctx, n, p.hosts)
}

func (p *places) target(ctx context.Context, n transport.Name) (transport.Target, error) {
	if n.Transport != transport.Containerd {
		return transport.OpenTarget(ctx, n, p.hosts)
	}
	if namedByDigest(n.Image) {
		return nil, errDigest(n.Image)
	}
	return p.inContainerd(n), nil
}

func (p *places) inContainerd(n transport.Name) *containerdImage {
	return &containerdImage{Store: localstore.New(p.client), client: p.client, name: n.Image}
}

// layersOf returns the layers of an image. Where there is no containerd, a name without
// a transport is that of a registry.
func (p *places) layersOf(ctx context.Context, name string) ([]ocispec.Descriptor, error) {
	n, err := parseName(name)
	if err == nil && n.Transport == transport.Containerd {
		if p.client != nil {
			return layersOf(ctx, p.client, p.cmd, n.Image)
		}
		n, err = parseName(transport.Registry + "://" + n.Image)
	}
	if err != nil {
		return nil, err
	}
	source, err := p.source(ctx, n)
	if err != nil {
		return nil, err
	}
	defer source.Close()
	target, err := source.Resolve(ctx)
	if err != nil {
		return nil, err
	}
	return layerDescriptors(ctx, transport.NewPair(source, nil), target, image.Options{})
}

// between encrypts or decrypts an image that is in one place into another, with do.
func (p *places) between(ctx context.Context, verb string, from, to transport.Name, opts image.Options, do cryptFunc) (err error) {
	source, err := p.source(ctx, from)
	if err != nil {
		return err
	}
	defer source.Close()
	target, err := p.target(ctx, to)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, target.Close()) }()
	desc, err := source.Resolve(ctx)
	if err != nil {
		return err
	}
	before, err := target.Resolve(ctx)
	force := p.cmd.Bool("force")
	switch {
	case err == nil:
		if to != from && !force {
			return fmt.Errorf("%s already exists: remove it first, or replace it with --force", to)
		}
	case errdefs.IsAlreadyExists(err):
		if !force {
			return fmt.Errorf("%s already exists, and its file would be replaced with all that it holds: give another one, or replace it with --force", to)
		}
	case !errdefs.IsNotFound(err):
		return fmt.Errorf("%s: %w", to, err)
	}

	progress := newProgress(verb)
	opts.Progress = progress.add
	pair := transport.NewPair(source, target)
	earlier := func(ctx context.Context) (earlierImage, error) {
		replaced := &to
		if before.Digest == "" || before.Digest == desc.Digest {
			replaced = nil
		}
		return p.earlier(ctx, replaced, pair.Take)
	}
	result, err := do(ctx, workplace{pair, p.layersOf, earlier}, desc, opts)
	if err == nil && ctx.Err() != nil {
		err = ctx.Err()
	}
	var moved transport.Moved
	if err == nil && result.Layers == 0 && verb == "encrypt" {
		err = errNothingEncrypted
	}
	if err == nil && !force {
		err = unchanged(ctx, target, to, before)
	}
	if err == nil {
		moved, err = pair.Finish(ctx, result.Target)
	}
	progress.stop()
	if plain := (*image.PlainError)(nil); errors.As(err, &plain) {
		return refused(p.cmd, plain)
	}
	if err != nil {
		return explainRefusal(err)
	}
	if verb == "encrypt" {
		warnKept(from, to, desc)
	}
	p.warnReferrers(ctx, source, desc)
	return report(p.cmd, verb, to.String(), result, &moved)
}

// unchanged returns an error if the name that is to be given stands for something else
// than before.
func unchanged(ctx context.Context, target transport.Target, name transport.Name, before ocispec.Descriptor) error {
	now, err := target.Resolve(ctx)
	if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("%s: %w", name, err)
	}
	if now.Digest != before.Digest || before.Digest == "" && errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("%s was changed while this command ran: try again, or replace it with --force", name)
	}
	return nil
}

// warnKept says that the readable image is still where its name was given to the
// encrypted one: only the name is gone.
func warnKept(from, to transport.Name, desc ocispec.Descriptor) {
	switch {
	case from == to && to.Transport == transport.Registry:
		fmt.Fprintf(os.Stderr, "ctr-pilot: stays readable: the previous image, as %s, until the registry deletes it\n", desc.Digest)
	case from.Transport == transport.OCI && to.Transport == transport.OCI && sameFile(from.Path, to.Path):
		fmt.Fprintf(os.Stderr, "ctr-pilot: stays readable: the previous image, whose blobs are still in %s: encrypt into another directory to publish it\n", to.Path)
	}
}

func sameFile(a, b string) bool {
	x, errX := os.Stat(a)
	y, errY := os.Stat(b)
	return errX == nil && errY == nil && os.SameFile(x, y)
}

// warnReferrers names signatures and the like that are about the image in a registry,
// and not about what was made of it.
func (p *places) warnReferrers(ctx context.Context, source transport.Source, desc ocispec.Descriptor) {
	r, ok := source.(interface {
		Referrers(context.Context, ocispec.Descriptor) ([]registry.Referrer, error)
	})
	if !ok {
		return
	}
	list, err := r.Referrers(ctx, desc)
	if err != nil {
		fmt.Fprintf(os.Stderr, "ctr-pilot: warning: what refers to the image, such as signatures, could not be listed: %s\n", shownText(err.Error()))
	}
	for _, r := range list {
		fmt.Fprintf(os.Stderr, "ctr-pilot: left out: %s, which refers to %s: sign the new image\n", shownText(r.String()), desc.Digest)
	}
}

// containerdImage is an image in containerd, as [transport.Target].
type containerdImage struct {
	image.Store
	client *containerd.Client
	name   string
}

func (c *containerdImage) Resolve(ctx context.Context) (ocispec.Descriptor, error) {
	img, err := getImage(ctx, c.client, c.name)
	return img.Target, err
}

func (c *containerdImage) Close() error { return nil }

func (c *containerdImage) Copy(ctx context.Context, from content.Provider, desc ocispec.Descriptor) (registry.Origin, error) {
	return transport.CopyBlob(ctx, c, from, desc)
}

func (c *containerdImage) Document(ctx context.Context, from content.Provider, desc ocispec.Descriptor) error {
	if _, err := c.Copy(ctx, from, desc); err != nil {
		return err
	}
	// containerd's garbage collector follows labels.
	_, err := images.SetChildrenMappedLabels(c.client.ContentStore(), images.ChildrenHandler(c.client.ContentStore()), images.ChildGCLabels)(ctx, desc)
	return err
}

func (c *containerdImage) Name(ctx context.Context, from content.Provider, desc ocispec.Descriptor) error {
	if err := c.Document(ctx, from, desc); err != nil {
		return err
	}
	store := c.client.ImageService()
	img := images.Image{Name: c.name, Target: desc}
	_, err := store.Create(ctx, img)
	if errdefs.IsAlreadyExists(err) {
		_, err = store.Update(ctx, img, "target")
	}
	return err
}
