package image

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/wireformat"
	"github.com/ctrlplane/pilot/processor"
)

// Rewrapping is how the recipients of layers change. The zero value rewraps the layer
// keys for the current versions of their KEKs.
type Rewrapping struct {
	// Keys unwrap the layer keys, and their key providers rewrap them.
	Keys processor.Keys
	// From is the id of a KEK that the KEK To replaces, with the same key provider.
	// They may be the same KEK: then the layer keys are rewrapped only for that one.
	// Keys in the original's format, which does not name the KEK, are tried with From.
	From, To string
	// Add are recipients to add: see [processor.Recipients.Parameters]. For a KEK that
	// is one already, the layer key is rewrapped instead.
	Add map[string][][]byte
	// Remove are recipients to remove. Those of one scheme can be distinguished
	// only if they are KEKs.
	Remove []Recipient
	// DryRun does everything except write.
	DryRun bool
}

// Rewrapped is the outcome of [Rewrap].
type Rewrapped struct {
	Result
	// Encrypted is how many of the selected layers are encrypted.
	Encrypted int
	// Changes describe which recipients were replaced by which, each once however
	// many layers have them.
	Changes []string
	// Had are the recipients that the selected layers had, each once.
	Had []Recipient
	// Missing are those of From and Remove that no selected layer had.
	Missing []string
}

// Rewrap gives the encrypted layers of the image target other recipients. Only
// annotations change, so no layer has to be in the store.
//
// Nobody becomes a recipient because of the image alone: a layer key is wrapped
// anew for a KEK that the caller did not name only if what was wrapped for that
// KEK unwraps to the layer key. What can't be unwrapped is an error.
func Rewrap(ctx context.Context, store Store, target ocispec.Descriptor, how Rewrapping, opts Options) (Rewrapped, error) {
	if (how.From == "") != (how.To == "") {
		return Rewrapped{}, errors.New("the KEK to replace and the one that replaces it need each other: name both")
	}
	if how.To != "" {
		if err := wireformat.ValidateKEKID(how.To); err != nil {
			return Rewrapped{}, err
		}
	}
	r := &rewrap{Rewrapping: how, changes: map[string]bool{}, had: map[Recipient]bool{}, found: map[Recipient]bool{}}
	w := newWork(store, opts, rewrapping, r.layer)
	w.dry = how.DryRun
	result, err := w.run(ctx, target)
	if err != nil {
		return Rewrapped{}, err
	}
	out := Rewrapped{Result: result, Encrypted: r.layers, Changes: slices.Sorted(maps.Keys(r.changes))}
	out.Had = slices.SortedFunc(maps.Keys(r.had), func(a, b Recipient) int { return strings.Compare(a.String(), b.String()) })
	if from := (Recipient{KEK: how.From}); how.From != "" && !r.found[from] {
		out.Missing = append(out.Missing, fmt.Sprintf("KEK %q", how.From))
	}
	for _, rec := range how.Remove {
		if !r.found[rec] {
			out.Missing = append(out.Missing, rec.String())
		}
	}
	return out, nil
}

// rewrap is one [Rewrap].
type rewrap struct {
	Rewrapping

	mu      sync.Mutex
	layers  int
	changes map[string]bool
	had     map[Recipient]bool
	found   map[Recipient]bool // of what was to be moved or removed
}

// layer gives a layer other recipients.
func (r *rewrap) layer(ctx context.Context, _ *work, desc ocispec.Descriptor) (change, error) {
	ctx, cancel := context.WithTimeout(ctx, keyTimeout)
	defer cancel()
	l := &layerRewrap{rewrap: r, desc: desc, fresh: map[Recipient]bool{}}
	defer l.clear()
	annotations, err := l.annotations(ctx)
	if err == nil {
		err = readable(desc.Annotations, annotations)
	}
	if err != nil {
		return change{}, err
	}
	c := change{desc: desc, annotations: map[string]string{}}
	for key := range desc.Annotations {
		if strings.HasPrefix(key, keysPrefix) && annotations[key] == "" {
			c.annotations[key] = ""
		}
	}
	for key, v := range annotations {
		if desc.Annotations[key] != v {
			c.annotations[key] = v
		}
	}
	c.none = len(c.annotations) == 0

	r.mu.Lock()
	defer r.mu.Unlock()
	r.layers++
	had := recipientsOf(desc.Annotations)
	for _, rec := range had {
		r.had[rec] = true
	}
	if !c.none {
		r.changes[difference(had, recipientsOf(annotations), c.annotations)] = true
	}
	return c, nil
}
