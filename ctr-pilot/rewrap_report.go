package main

import (
	"time"

	"github.com/ctrlplane/pilot/image"
)

// rewrapResult is what "rewrap --json" prints of each image.
type rewrapResult struct {
	Image string `json:"image"` // or the pattern that failed
	// Result is changed, wouldChange (with --dry-run), upToDate, notEncrypted or
	// failed.
	Result  string   `json:"result"`
	Digest  string   `json:"digest,omitempty"` // now, or with --dry-run then
	Layers  int      `json:"layers,omitempty"` // that change
	Changes []string `json:"changes,omitempty"`
	Error   string   `json:"error,omitempty"`
	Millis  int64    `json:"millis"`
}

func (r *rewrapper) result(name string, out image.Rewrapped, start time.Time, err error) rewrapResult {
	v := rewrapResult{Image: name, Digest: out.Target.Digest.String(), Layers: out.Layers, Changes: out.Changes, Millis: time.Since(start).Milliseconds()}
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
