package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/image"
)

// isPattern reports whether a name stands for several images, as [glob.MatchName] has
// it.
func isPattern(name string) bool { return strings.ContainsAny(name, "*?") }

// tally counts what became of images.
type tally struct {
	changed, same, plain, failed int
	missing                      []string // of what was to be moved or removed, what none had so far
	had                          []image.Recipient
	results                      []rewrapResult // for --json
}

// all rewraps several images. It goes on after one failed, and stops when ctx is
// done.
func (r *rewrapper) all(ctx context.Context, p place) error {
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
			break // it was not its fault
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

// printSum prints what became of the images in all.
func (r *rewrapper) printSum(t *tally, images, tried int) error {
	if r.cmd.Bool("json") {
		return printJSON(t.results)
	}

	changed := "changed"
	if r.how.DryRun {
		changed = "would change"
	}
	fmt.Printf("%d images: %d %s, %d up to date, %d not encrypted, %d failed", images, t.changed, changed, t.same, t.plain, t.failed)
	if left := images - tried; left > 0 {
		fmt.Printf(", %d not tried", left)
	}
	fmt.Println()
	return nil
}

// oneOfMany rewraps an image, if it does not take too long.
func (r *rewrapper) oneOfMany(ctx context.Context, p place, name string) (image.Rewrapped, error) {
	timeout := r.cmd.Duration("image-timeout")
	within, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	out, err := r.one(within, p, name, "")
	if err != nil && within.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("it took longer than %s (--image-timeout): %w", timeout, err)
	}
	return out, err
}

// expand returns the images that the names and patterns stand for, each once.
func (r *rewrapper) expand(ctx context.Context, p place, t *tally) []string {
	var names []string
	seen := make(map[string]bool)
	for _, name := range r.names {
		found := []string{name}
		if isPattern(name) {
			var err error
			found, err = p.names(ctx, name)
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

func (t *tally) fail(name string, err error) {
	t.failed++
	fmt.Fprintf(os.Stderr, "ctr-pilot: %s: %s\n", shownText(name), shownText(err.Error()))
}

func (t *tally) count(out image.Rewrapped) {
	if out.Encrypted == 0 {
		t.plain++
		return
	}
	if t.changed+t.same == 0 {
		t.missing = out.Missing
	}
	t.missing = slices.DeleteFunc(t.missing, func(s string) bool { return !slices.Contains(out.Missing, s) })
	for _, rec := range out.Had {
		if !slices.Contains(t.had, rec) {
			t.had = append(t.had, rec)
		}
	}
	if out.Layers > 0 {
		t.changed++
	} else {
		t.same++
	}
}
