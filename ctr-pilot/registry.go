package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/exit"
)

// inRegistry are the images of registries. Their manifests are kept in a
// directory while they are worked on.
type inRegistry struct {
	hosts   docker.RegistryHosts
	dir     string
	store   content.Store
	configs bool // are needed
}

const (
	// registryTimeout bounds the wait for a registry, for one document.
	registryTimeout = time.Minute
	// maxDocument bounds a document, in bytes.
	maxDocument = 8 << 20
)

// openRegistry returns the registries that the command's flags reach. The caller
// closes it.
func openRegistry(ctx context.Context, cmd *cli.Command) (*inRegistry, error) {
	if !cmd.Bool("debug") {
		// containerd's code logs which hosts it tries and how it stores files. What
		// matters of that is in errors.
		if err := log.SetLevel("error"); err != nil {
			return nil, err
		}
	}
	hosts, err := registryHosts(ctx, cmd)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "ctr-pilot-")
	if err != nil {
		return nil, err
	}
	store, err := local.NewStore(dir)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return &inRegistry{hosts: hosts, dir: dir, store: store, configs: len(cmd.StringSlice("platform")) > 0}, nil
}

func (r *inRegistry) close() {
	if err := os.RemoveAll(r.dir); err != nil {
		fmt.Fprintf(os.Stderr, "ctr-pilot: warning: %v\n", err)
	}
}

func (r *inRegistry) absent() string { return "it is not in the registry" }

func (r *inRegistry) open(ctx context.Context, name, newName string) (*openImage, error) {
	from, err := parseReference(name)
	if err != nil {
		return nil, err
	}
	to, err := parseReference(newName)
	if err != nil {
		return nil, err
	}
	if to.Digest() != "" {
		return nil, errDigest(newName)
	}
	if from.Locator != to.Locator {
		return nil, fmt.Errorf("%s is in another repository than %s, where its layers are not: copy it there first", newName, name)
	}
	// A new one for each image: it remembers what it pushed, but not where.
	resolver := docker.NewResolver(docker.ResolverOptions{Hosts: r.hosts})
	target, err := resolve(ctx, resolver, name)
	if err != nil {
		return nil, err
	}
	before := target
	if newName != name {
		before, err = resolve(ctx, resolver, newName)
		if err == nil {
			return nil, errTaken(newName)
		}
		if !errdefs.IsNotFound(err) {
			return nil, err
		}
	}
	fetcher, err := resolver.Fetcher(ctx, name)
	if err != nil {
		return nil, err
	}
	d := newDocuments(r, fetcher)
	return &openImage{d, target, func(ctx context.Context, target ocispec.Descriptor) error {
		if err := d.pushChildren(ctx, resolver, to.Locator, target); err != nil {
			return err
		}
		now, err := resolve(ctx, resolver, newName)
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		if now.Digest != before.Digest {
			return fmt.Errorf("%s was changed while this command ran, and stays as it is: try again", newName)
		}
		return d.push(ctx, resolver, newName, target)
	}}, nil
}

// parseReference reads the name of an image in a registry.
func parseReference(name string) (reference.Spec, error) {
	spec, err := reference.Parse(name)
	if err == nil && (spec.Object == "" || !strings.Contains(spec.Locator, "/")) {
		err = exit.Usagef("it takes a registry, a repository and a tag, as in registry.example.com/app:1")
	}
	if err != nil {
		return reference.Spec{}, fmt.Errorf("%q: %w", name, err)
	}
	return spec, nil
}

// resolve returns the descriptor of a name, or the zero value and an error.
func resolve(ctx context.Context, resolver remotes.Resolver, name string) (ocispec.Descriptor, error) {
	ctx, cancel := context.WithTimeout(ctx, registryTimeout)
	defer cancel()
	_, desc, err := resolver.Resolve(ctx, name)
	return desc, err
}

// documents is a content store that gets manifests, and configurations if they
// are wanted, from a registry when they are read. It has no layers.
type documents struct {
	content.Store
	fetcher remotes.Fetcher
	configs bool

	mu      sync.Mutex
	fetched map[digest.Digest]bool // or pushed
}

func newDocuments(r *inRegistry, fetcher remotes.Fetcher) *documents {
	return &documents{Store: r.store, fetcher: fetcher, configs: r.configs, fetched: map[digest.Digest]bool{}}
}

func (d *documents) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	ra, err := d.Store.ReaderAt(ctx, desc)
	if !errdefs.IsNotFound(err) {
		return ra, err
	}
	if !isDocument(desc) && !(d.configs && images.IsConfigType(desc.MediaType)) {
		return nil, err
	}
	if desc.Size > maxDocument {
		return nil, fmt.Errorf("%s has %d bytes, more than %d", desc.Digest, desc.Size, maxDocument)
	}
	within, cancel := context.WithTimeout(ctx, registryTimeout)
	defer cancel()
	body, err := d.fetcher.Fetch(within, desc)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	// Content that is longer than its descriptor says does not fill the disk.
	if err := content.WriteBlob(within, d.Store, remotes.MakeRefKey(ctx, desc), io.LimitReader(body, desc.Size+1), desc); err != nil {
		return nil, err
	}
	d.mu.Lock()
	d.fetched[desc.Digest] = true
	d.mu.Unlock()
	return d.Store.ReaderAt(ctx, desc)
}

// isDocument reports whether desc is that of an index or a manifest.
func isDocument(desc ocispec.Descriptor) bool {
	return images.IsIndexType(desc.MediaType) || images.IsManifestType(desc.MediaType)
}

// pushChildren pushes what is new of what an index lists, each once.
func (d *documents) pushChildren(ctx context.Context, resolver remotes.Resolver, repository string, desc ocispec.Descriptor) error {
	if !images.IsIndexType(desc.MediaType) {
		return nil
	}
	children, err := images.Children(ctx, d.Store, desc)
	if err != nil {
		return err
	}
	for _, child := range children {
		if _, err := d.Info(ctx, child.Digest); !isDocument(child) || errdefs.IsNotFound(err) || d.fetched[child.Digest] {
			continue
		}
		if err := d.pushChildren(ctx, resolver, repository, child); err != nil {
			return err
		}
		if err := d.push(ctx, resolver, repository+"@"+child.Digest.String(), child); err != nil {
			return err
		}
		d.mu.Lock()
		d.fetched[child.Digest] = true
		d.mu.Unlock()
	}
	return nil
}

func (d *documents) push(ctx context.Context, resolver remotes.Resolver, name string, desc ocispec.Descriptor) error {
	ctx, cancel := context.WithTimeout(ctx, registryTimeout)
	defer cancel()
	pusher, err := resolver.Pusher(ctx, name)
	if err != nil {
		return err
	}
	if _, err := remotes.PushHandler(pusher, d)(ctx, desc); err != nil {
		return fmt.Errorf("push %s: %w", name, explainRefusal(err))
	}
	return nil
}
