package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/image/layout"
	"github.com/ctrlplane/pilot/image/transport"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/glob"
)

// isPattern reports whether a name is a pattern of [glob.MatchName].
func isPattern(name string) bool { return strings.ContainsAny(name, "*?") }

// isPattern reports whether the name of an image is a pattern. The path of a file is not.
func (r *rewrapper) isPattern(name string) bool {
	if n, err := r.parse(name); err == nil && n.Transport != transport.Registry {
		return isPattern(n.Image)
	}
	return isPattern(name)
}

// matching returns the names of the images that match a pattern.
func (r *rewrapper) matching(ctx context.Context, p *places, pattern string) ([]string, error) {
	if ref, ok := strings.CutPrefix(r.spelled(pattern), transport.Registry+"://"); ok {
		names, err := p.tagNames(ctx, ref)
		for i := range names {
			names[i] = strings.TrimSuffix(pattern, ref) + names[i]
		}
		return names, err
	}
	n, err := r.parse(pattern)
	if err != nil {
		return nil, err
	}
	var all []string
	switch n.Transport {
	case transport.Containerd:
		all, err = p.imageNames(ctx)
	case transport.OCI:
		all, err = namesInLayout(ctx, n.Path)
	default:
		return nil, exit.Usagef("patterns are for images in containerd, for tags in a registry and for names in a directory: an archive is written anew for each image, so name one")
	}
	var names []string
	for _, name := range all {
		if glob.MatchName(n.Image, name) {
			names = append(names, strings.TrimSuffix(pattern, n.Image)+name)
		}
	}
	return names, err
}

// imageNames returns the names of the images in containerd that can be given to another.
func (p *places) imageNames(ctx context.Context) ([]string, error) {
	all, err := p.client.ImageService().List(ctx)
	var names []string
	for _, img := range all {
		if !namedByDigest(img.Name) {
			names = append(names, img.Name)
		}
	}
	return names, err
}

func namesInLayout(ctx context.Context, dir string) ([]string, error) {
	l, err := layout.Open(dir)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	return l.Names(ctx)
}

// all rewraps several images. It continues after a failure, and stops when ctx is done.
func (r *rewrapper) all(ctx context.Context, p *places) error {
	t := &tally{results: []rewrapResult{}}
	names := r.expand(ctx, p, t)
	tried := 0
	for _, name := range names {
		start := time.Now()
		if ctx.Err() != nil {
			break
		}
		out, err := r.oneOfMany(ctx, p, name)
		if err != nil && ctx.Err() != nil {
			break // the command was stopped, so the image did not fail
		}
		tried++
		t.results = append(t.results, r.result(name, out, start, err))
		if err != nil {
			t.fail(name, err)
			continue
		}
		t.count(out.Rewrapped)
		if !r.cmd.Bool("json") {
			fmt.Println(r.line(name, out, start))
		}
	}
	if err := r.printSum(t, len(names), tried); err != nil {
		return err
	}
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("stopped: %w", ctx.Err())
	case t.failed > 0:
		return fmt.Errorf("%d failed", t.failed)
	case t.changed+t.same > 0 && len(t.missing) > 0:
		return r.unfit(image.Rewrapped{Encrypted: 1, Missing: t.missing, Had: t.had})
	}
	return nil
}

// oneOfMany rewraps an image, if it does not take too long.
func (r *rewrapper) oneOfMany(ctx context.Context, p *places, name string) (rewrapped, error) {
	timeout := r.cmd.Duration("image-timeout")
	within, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	out, err := r.one(within, p, name, "")
	if err != nil && within.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("it took longer than %s (--image-timeout): %w", timeout, err)
	}
	return out, explainRegistry(r.cmd, err)
}

// expand returns the images that are named or match a pattern, each once.
func (r *rewrapper) expand(ctx context.Context, p *places, t *tally) []string {
	var names []string
	seen := make(map[string]bool)
	for _, name := range r.names {
		found := []string{name}
		if r.isPattern(name) {
			var err error
			found, err = r.matching(ctx, p, name)
			if err == nil && len(found) == 0 {
				err = errors.New("no image matches")
			}
			if err = explainRegistry(r.cmd, err); err != nil {
				t.results = append(t.results, r.result(name, rewrapped{}, time.Now(), err))
				t.fail(name, err)
			}
		}
		for _, name := range found {
			if !seen[name] {
				seen[name] = true
				names = append(names, name)
			}
		}
	}
	return names
}
