package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/image/transport"
)

// crypt encrypts or decrypts an image into another place, or its own, with do. toName is
// the new name as it was spelled.
func (p *places) crypt(ctx context.Context, verb string, from, to transport.Name, toName string, opts image.Options, do cryptFunc) (err error) {
	j, err := p.open(ctx, from, to, p.cmd.Bool("force"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, j.close()) }()
	progress := newProgress(verb)
	opts.Progress = progress.add
	earlier := func(ctx context.Context) (earlierImage, error) {
		var replaced *transport.Name
		if j.replaced.Digest != "" && j.replaced.Digest != j.desc.Digest { // which takes --force
			replaced = &to
		}
		return p.earlier(ctx, replaced, j.Take)
	}
	result, err := do(ctx, workplace{j, p.layersOf, earlier, j.convert}, j.desc, opts)
	if err == nil && ctx.Err() != nil {
		err = ctx.Err()
	}
	if err == nil && result.Layers == 0 && verb == "encrypt" {
		err = errNothingEncrypted
	}
	var done finished
	if err == nil {
		done, err = j.finish(ctx, result, verb == "decrypt")
		done.converted = j.converted
	}
	progress.stop()
	if plain := (*image.PlainError)(nil); errors.As(err, &plain) {
		err = refused(p.cmd, plain)
	}
	if err != nil {
		if c, ok := j.source.(*containerdImage); ok {
			err = withFetch(ctx, err, c.image)
		}
		return err
	}
	if verb == "encrypt" {
		if what := j.stillReadable(ctx); what != "" {
			fmt.Fprintf(os.Stderr, "ctr-pilot: stays readable: %s\n", what)
		}
	}
	return report(p.cmd, verb, toName, result, done)
}

// stillReadable says that a readable image is still where its name was given to the encrypted
// one: only the name is gone. It returns "" if there is none: an image that only got recipients
// was not readable.
func (j *job) stillReadable(ctx context.Context) string {
	var kept []ocispec.Descriptor
	if j.replaced.Digest != "" && (j.to.Transport == transport.Registry || j.to.Transport == transport.OCI) {
		kept = append(kept, j.replaced)
	}
	if j.from.Transport == transport.OCI && j.to.Transport == transport.OCI && sameFile(j.from.Path, j.to.Path) {
		kept = append(kept, j.desc)
	}
	for _, desc := range kept {
		plain, err := image.Inspect(ctx, transport.NewPair(j.target, nil), desc, image.Options{})
		switch {
		case err == nil && len(image.NotEncrypted(plain)) == 0:
		case j.to.Transport == transport.Registry:
			return fmt.Sprintf("the previous image, as %s, until the registry deletes it", desc.Digest)
		default:
			return fmt.Sprintf("the previous image, whose blobs are still in %s: encrypt into another directory to publish it", j.to.Path)
		}
	}
	return ""
}

func sameFile(a, b string) bool {
	x, errX := os.Stat(a)
	y, errY := os.Stat(b)
	return errX == nil && errY == nil && os.SameFile(x, y)
}
