package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/image/transport"
)

// rewrapResult is what "rewrap --json" prints for each image.
type rewrapResult struct {
	Image string `json:"image"` // or the pattern that failed
	// Result is changed, wouldChange (with --dry-run), upToDate, notEncrypted or
	// failed.
	Result  string   `json:"result"`
	Digest  string   `json:"digest,omitempty"` // the new one, also with --dry-run
	Layers  int      `json:"layers,omitempty"` // that change
	Changes []string `json:"changes,omitempty"`
	// Referrers are signatures and the like that are about the image before, and whether
	// they are about the new one too.
	Referrers      []transport.Referrer `json:"referrers,omitempty"`
	ReferrersError string               `json:"referrersError,omitempty"` // why some may be missing
	Moved          *transport.Moved     `json:"moved,omitempty"`
	Error          string               `json:"error,omitempty"`
	Millis         int64                `json:"millis"`
}

func (r *rewrapper) result(name string, out rewrapped, start time.Time, err error) rewrapResult {
	v := rewrapResult{Image: name, Digest: out.Target.Digest.String(), Layers: out.Layers, Changes: out.Changes, Millis: time.Since(start).Milliseconds()}
	v.Referrers, v.ReferrersError, v.Moved = out.referrers, out.unlistedText(), out.moved
	switch {
	case err != nil:
		return rewrapResult{Image: name, Result: "failed", Error: err.Error(), Millis: v.Millis}
	case out.Encrypted == 0:
		v.Result = "notEncrypted"
	case out.Layers == 0:
		v.Result = "upToDate"
	case r.how.DryRun:
		v.Result = "wouldChange"
	default:
		v.Result = "changed"
	}
	return v
}

// line returns what happened to an image, in one line.
func (r *rewrapper) line(name string, out rewrapped, start time.Time) string {
	took := time.Since(start).Round(time.Millisecond)
	switch {
	case out.Encrypted == 0:
		return fmt.Sprintf("%s has no encrypted layers (%s)", name, took)
	case out.Layers == 0:
		return fmt.Sprintf("%s %s is up to date (%s)", name, out.Target.Digest, took)
	case r.how.DryRun:
		return fmt.Sprintf("%s would change (%d layers: %s, %s)", name, out.Layers, shown(strings.Join(out.Changes, "; ")), took)
	}
	return fmt.Sprintf("%s %s (%d layers: %s, %s)", name, out.Target.Digest, out.Layers, shown(strings.Join(out.Changes, "; ")), took)
}

// tally counts images by what happened to them.
type tally struct {
	changed, same, plain, failed int
	missing                      []string // what was to be moved or removed and no image had so far
	had                          []image.Recipient
	results                      []rewrapResult // for --json
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

// printSum prints how many images changed, stayed or failed.
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
