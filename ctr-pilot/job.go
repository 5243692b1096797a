package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/image/transport"
)

// job is an image that is read in one place, and what is made of it gets a name there or
// in another place.
type job struct {
	*transport.Pair
	from, to transport.Name
	source   transport.Source
	target   transport.Target
	desc     ocispec.Descriptor // what from stands for
	before   *digest.Digest     // what to stands for, or nil if it is replaced in any case
	replaced ocispec.Descriptor // what to stands for, or none

	converted *image.Converted // what desc became with --estargz, or nil
}

// takenError is the error of a new name that another image has.
type takenError struct {
	name transport.Name
	text string
}

func (e *takenError) Error() string { return e.text }

func (e *takenError) Unwrap() error { return errdefs.ErrAlreadyExists }

// errDigest is the error of a name that can't be that of another image.
func errDigest(name string) error {
	return fmt.Errorf("%s is named by its digest, which changes: give it a new name", name)
}

// registryGCPercent is GOGC when an image is written to a registry. By default there may be as
// much garbage as there is in use, which are the parts of layers that are being sent. There
// is little garbage to collect.
const registryGCPercent = 25

// open opens an image that is to get a new name, or its own. Another image of the new name
// is an error unless force is set. The caller closes the job.
func (p *places) open(ctx context.Context, from, to transport.Name, force bool) (_ *job, err error) {
	j := &job{from: from, to: to}
	defer func() {
		if err != nil {
			err = errors.Join(err, j.close())
		}
	}()
	if to.Transport == transport.Containerd && namedByDigest(to.Image) {
		return nil, errDigest(to.Image)
	}
	if to.Transport != transport.Containerd {
		// What can't be written to is an error before anything is read.
		if j.target, err = transport.OpenTarget(ctx, to, to == from, p.hosts); err != nil {
			return nil, err
		}
	}
	if j.source, err = p.source(ctx, from); err != nil {
		return nil, err
	}
	if j.desc, err = j.source.Resolve(ctx); err != nil {
		return nil, err
	}
	if j.target == nil {
		j.target = p.inContainerd(to.Image, j.source, force)
	}
	if to.Transport == transport.Registry && os.Getenv("GOGC") == "" {
		debug.SetGCPercent(registryGCPercent)
	}
	j.Pair = transport.NewPair(j.source, j.target)
	return j, j.check(ctx, force)
}

// check notes what the new name stands for, which must be nothing unless it is the image's
// own or force is set.
func (j *job) check(ctx context.Context, force bool) error {
	before, err := j.desc, error(nil)
	if j.to != j.from || !j.target.Holds(j.source) {
		before, err = j.target.Resolve(ctx)
	}
	switch {
	case err == nil && j.to != j.from && !force && j.to.Transport == transport.Containerd:
		return &takenError{j.to, fmt.Sprintf("image %s already exists: remove it first, or replace it with --force", j.to.Image)}
	case err == nil && j.to != j.from && !force:
		return &takenError{j.to, fmt.Sprintf("%s already exists: remove it first, or replace it with --force", j.to)}
	case errdefs.IsAlreadyExists(err) && !force:
		return fmt.Errorf("%s already exists, and its file would be replaced with all that it holds: give another one, or replace it with --force", j.to)
	case err != nil && !errdefs.IsAlreadyExists(err) && !errdefs.IsNotFound(err):
		return fmt.Errorf("%s: %w", j.to, err)
	}
	j.replaced = before
	if !force {
		j.before = &before.Digest
	}
	return nil
}

// convert converts the image to eStargz.
func (j *job) convert(ctx context.Context, opts image.Options) (ocispec.Descriptor, error) {
	var err error
	if j.converted, err = j.Convert(ctx, j.desc, opts); err != nil {
		return ocispec.Descriptor{}, err
	}
	return j.converted.Target, nil
}

func (j *job) close() error {
	var err error
	if j.converted != nil {
		err = j.converted.Close()
	}
	if j.source != nil {
		err = errors.Join(err, j.source.Close())
	}
	if j.target != nil {
		err = errors.Join(err, j.target.Close())
	}
	return err
}

// inOneStore reports whether the image stays in containerd.
func (j *job) inOneStore() bool {
	return j.from.Transport == transport.Containerd && j.to.Transport == transport.Containerd
}

// finished says what was moved, and what became of what is about the image.
type finished struct {
	moved     *transport.Moved // nil if the image stayed in containerd
	referrers []transport.Referrer
	unlisted  error // why referrers may be missing
	converted *image.Converted
}

// finish brings what was made of the image where it belongs, and names it. restored says
// that the new image may have referrers already.
func (j *job) finish(ctx context.Context, result image.Result, restored bool) (finished, error) {
	var f finished
	f.referrers, f.unlisted = j.Referrers(ctx, j.desc, result.Target, restored)
	if err := ctx.Err(); err != nil {
		return finished{}, err
	}
	moved, err := j.Finish(ctx, result, j.before, f.referrers)
	if errdefs.IsConflict(err) {
		err = fmt.Errorf("%s was changed while this command ran, and stays as it is: try again", j.to)
	}
	if err != nil {
		return finished{}, explainRefusal(err)
	}
	if !j.inOneStore() {
		f.moved = &moved
	}
	return f, nil
}

func (f finished) unlistedText() string {
	if f.unlisted == nil {
		return ""
	}
	return f.unlisted.Error()
}

// printReferrers prints a line for each signature and the like, with what became of it.
func (f finished) printReferrers() {
	if f.unlisted != nil {
		fmt.Fprintf(os.Stderr, "ctr-pilot: warning: what refers to the image, such as signatures, could not be listed: %s\n", shownText(f.unlisted.Error()))
	}
	for _, r := range f.referrers {
		what, why := "left out", ": sign the new image"
		switch {
		case r.Kept:
			what, why = "kept", ""
		case r.Error != "":
			why = ", and could not be copied: " + r.Error
		}
		fmt.Fprintf(os.Stderr, "ctr-pilot: %s: %s\n", what, shownText(fmt.Sprintf("%s (%s), which refers to %s%s", r.Name, r.Type, r.Subject, why)))
	}
}
