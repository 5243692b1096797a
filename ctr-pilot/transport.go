package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/log"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/image/transport"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/localstore"
	"github.com/ctrlplane/pilot/internal/mistyped"
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
	// convert returns the image with its layers as eStargz, which it reads from there on.
	convert func(ctx context.Context, opts image.Options) (ocispec.Descriptor, error)
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
	if namesUser(cmd) {
		if err := oneRegistry(names); err != nil {
			return err
		}
	}
	hosts, err := registryHosts(ctx, cmd)
	if err != nil {
		return err
	}
	stock := do
	do = func(ctx context.Context, p *places) error { return explainRegistry(cmd, stock(ctx, p)) }
	for _, n := range names {
		if n.Transport == transport.Containerd {
			err := withClient(ctx, cmd, func(ctx context.Context, client *containerd.Client) error {
				return do(ctx, &places{cmd, client, hosts})
			})
			if failed := (*connectError)(nil); errors.As(err, &failed) {
				err = fmt.Errorf("%q names an image in containerd: %w (elsewhere: docker://REGISTRY/REPOSITORY:TAG, oci:DIRECTORY, oci-archive:FILE or docker-archive:FILE; another containerd: --address)%s",
					n.Image, err, meantTransport(n.Image))
			}
			return err
		}
	}
	ctx, stop := untilSignal(ctx)
	defer stop()
	return do(ctx, &places{cmd, nil, hosts})
}

// meantTransport asks whether a name in containerd is that of an image elsewhere, with
// its transport mistyped, or names the way from one of skopeo's that is none here.
func meantTransport(name string) string {
	before, _, ok := strings.Cut(name, ":")
	switch {
	case !ok:
		return ""
	case before == "docker-daemon":
		return `: for an image of Docker's, "docker save --output FILE" and docker-archive:FILE`
	case before == "containers-storage":
		return `: for an image of Podman's, "podman save --format oci-archive --output FILE" and oci-archive:FILE`
	}
	return mistyped.DidYouMean(before, []string{transport.Registry, transport.OCI, transport.OCIArchive, transport.DockerArchive, transport.Containerd})
}

func (p *places) source(ctx context.Context, n transport.Name) (transport.Source, error) {
	if n.Transport == transport.Containerd {
		return &containerdImage{Store: localstore.New(p.client), client: p.client, name: n.Image}, nil
	}
	return transport.OpenSource(ctx, n, p.hosts)
}

// layersOf returns the layers of an image. Where there is no containerd, a name without
// a transport is that of a registry.
func (p *places) layersOf(ctx context.Context, name string) ([]ocispec.Descriptor, error) {
	n, err := parseName(name)
	if err == nil && n.Transport == transport.Containerd {
		if p.client != nil {
			return p.layersOfEither(ctx, n.Image)
		}
		n, err = parseName(transport.Registry + "://" + n.Image)
	}
	if err != nil {
		return nil, err
	}
	return p.layersIn(ctx, n)
}

// oneRegistry returns an error if names are in several registries: each would get the
// password that is meant for one.
func oneRegistry(names []transport.Name) error {
	first := ""
	for _, n := range names {
		host, _, _ := strings.Cut(n.Image, "/")
		switch {
		case n.Transport != transport.Registry:
		case first == "":
			first = host
		case host != first:
			return errRegistries(first, host)
		}
	}
	return nil
}

func errRegistries(a, b string) error {
	return exit.Usagef("--user is for one registry, and these images are in %s and %s: leave it out and use the credentials of \"docker login\", or take one registry at a time", a, b)
}
