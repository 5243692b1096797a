package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/image"
)

// isPattern reports whether a name is a pattern of [glob.MatchName].
func isPattern(name string) bool { return strings.ContainsAny(name, "*?") }

// all rewraps several images. It continues after a failure, and stops when ctx is done.
func (r *rewrapper) all(ctx context.Context, src source) error {
	t := &tally{results: []rewrapResult{}}
	names := r.expand(ctx, src, t)
	tried := 0
	for _, name := range names {
		start := time.Now()
		if ctx.Err() != nil {
			break
		}
		out, err := r.oneOfMany(ctx, src, name)
		if err != nil && ctx.Err() != nil {
			break // the command was stopped, so the image did not fail
		}
		tried++
		t.results = append(t.results, r.result(name, out, start, err))
		if err != nil {
			t.fail(name, err)
			continue
		}
		t.count(out)
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
func (r *rewrapper) oneOfMany(ctx context.Context, src source, name string) (image.Rewrapped, error) {
	timeout := r.cmd.Duration("image-timeout")
	within, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	out, err := r.one(within, src, name, "")
	if err != nil && within.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("it took longer than %s (--image-timeout): %w", timeout, err)
	}
	return out, err
}

// expand returns the images that are named or match a pattern, each once.
func (r *rewrapper) expand(ctx context.Context, src source, t *tally) []string {
	var names []string
	seen := make(map[string]bool)
	for _, name := range r.names {
		found := []string{name}
		if isPattern(name) {
			var err error
			found, err = src.names(ctx, name)
			if err == nil && len(found) == 0 {
				err = errors.New("no image matches")
			}
			if err != nil {
				t.results = append(t.results, r.result(name, image.Rewrapped{}, time.Now(), err))
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
