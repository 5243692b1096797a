package main

import (
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/pkg/progress"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/image/transport"
)

func jsonFlag() cli.Flag { return &cli.BoolFlag{Name: "json", Usage: "print JSON"} }

// cryptReport is the JSON of encrypt and decrypt.
type cryptReport struct {
	Image  string        `json:"image,omitempty"` // its new name, unless it was refused
	Digest digest.Digest `json:"digest,omitempty"`
	Layers int           `json:"layers"` // that were encrypted, got recipients, or were decrypted
	// Plain is what is readable in the encrypted image, or what would be, if it was
	// refused.
	Plain   []image.Plain `json:"plain"`
	LeftOut []leftOut     `json:"leftOut"`
	// Referrers are signatures and the like that are about the image, and whether they
	// are kept with the new one.
	Referrers      []transport.Referrer `json:"referrers"`
	ReferrersError string               `json:"referrersError,omitempty"` // why some may be missing
	// Reused counts the layers, of those that were encrypted, that were taken over from
	// an earlier image.
	Reused *image.Reused `json:"reused,omitempty"`
	// Moved counts the bytes of an image that went from one place to another.
	Moved *transport.Moved `json:"moved,omitempty"`
	// Lazy says which of the layers that were encrypted can be pulled lazily.
	Lazy *lazyReport `json:"lazy,omitempty"`
}

// lazyReport is the JSON of what --estargz converted and encrypt sealed for lazy pulling.
type lazyReport struct {
	Layers  int             `json:"layers"` // that were sealed
	NotLazy []image.NotLazy `json:"notLazy"`
	// Converted counts the layers that were converted, and Digest is that of the plain
	// image then.
	Converted int           `json:"converted"`
	Digest    digest.Digest `json:"digest,omitempty"`
}

// leftOut is an entry of an index that the new one does not have.
type leftOut struct {
	Platform  string        `json:"platform,omitempty"`
	Digest    digest.Digest `json:"digest"`
	MediaType string        `json:"mediaType"`
}

// report prints what became of an image, after what stays readable in it.
func report(cmd *cli.Command, verb, name string, result image.Result, done finished) error {
	if verb == "decrypt" {
		warnSkipped(result.Skipped, "its content is not here (pull it with --all-platforms)")
	}
	warnLacking(result.Lacking)
	done.printReferrers()
	printNotReused(result.Reused)
	printLazy(result, done)
	if cmd.Bool("json") {
		return printJSON(newReport(verb, name, result, done))
	}
	for _, d := range result.LeftOut {
		fmt.Fprintf(os.Stderr, "ctr-pilot: left out: %s %s: %s\n", shown(d.Digest.String()), ofPlatform(d), whyLeftOut(cmd, d))
	}
	if verb == "encrypt" {
		printPlain("stays readable", image.NotEncrypted(result.Plain))
	}
	if result.Layers == 0 {
		fmt.Printf("%s has no encrypted layers\n", name)
	}
	fmt.Printf("%s %s (%d layers %sed%s%s%s)\n", name, result.Target.Digest, result.Layers, verb, reusedText(result.Reused), lazyText(result), movedText(done.moved))
	return nil
}

func newReport(verb, name string, result image.Result, done finished) cryptReport {
	r := cryptReport{
		Image: name, Digest: result.Target.Digest, Layers: result.Layers, Plain: result.Plain, LeftOut: []leftOut{},
		Referrers: done.referrers, ReferrersError: done.unlistedText(), Moved: done.moved,
	}
	if verb == "encrypt" {
		r.Reused = &result.Reused
		r.Lazy = &lazyReport{Layers: result.Lazy, NotLazy: append([]image.NotLazy{}, result.NotLazy...)}
		if done.converted != nil {
			r.Lazy.Converted, r.Lazy.Digest = done.converted.Layers, done.converted.Target.Digest
		}
	}
	if r.Plain == nil {
		r.Plain = []image.Plain{}
	}
	if r.Referrers == nil {
		r.Referrers = []transport.Referrer{}
	}
	for _, d := range result.LeftOut {
		platform := ""
		if d.Platform != nil {
			platform = platforms.FormatAll(*d.Platform)
		}
		r.LeftOut = append(r.LeftOut, leftOut{platform, d.Digest, d.MediaType})
	}
	return r
}

// printLazy says which layers can't be pulled lazily although they say so, and what
// became of the plain image.
func printLazy(result image.Result, done finished) {
	for _, l := range result.NotLazy {
		fmt.Fprintf(os.Stderr, "ctr-pilot: not lazy: %s\n", shownText(fmt.Sprintf("layer %s, which nodes pull in full: %s", l.Digest, l.Reason)))
	}
	if done.converted != nil && done.converted.Layers > 0 {
		fmt.Fprintf(os.Stderr, "ctr-pilot: converted: %d layers to eStargz; decrypting gives back %s, which signatures made before don't fit\n",
			done.converted.Layers, done.converted.Target.Digest)
	}
}

// lazyText says how many layers can be pulled lazily.
func lazyText(result image.Result) string {
	if result.Lazy == 0 {
		return ""
	}
	return fmt.Sprintf(", %d of them for lazy pulling", result.Lazy)
}

// movedText says how many bytes went where, as far as they are not new.
func movedText(m *transport.Moved) string {
	if m == nil {
		return ""
	}
	text := fmt.Sprintf("; %v written", progress.Bytes(m.Written+m.Copied))
	if m.Mounted > 0 {
		text += fmt.Sprintf(", %v mounted", progress.Bytes(m.Mounted))
	}
	if m.Present > 0 {
		text += fmt.Sprintf(", %v there already", progress.Bytes(m.Present))
	}
	return text
}
