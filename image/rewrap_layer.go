package image

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containers/ocicrypt/config"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/wireformat"
	"github.com/ctrlplane/pilot/processor"
)

// layerRewrap is one layer being given other recipients.
type layerRewrap struct {
	*rewrap
	desc  ocispec.Descriptor
	key   *processor.LayerKey // once it is known
	fresh map[Recipient]bool  // KEKs, without versions, that it was wrapped for anew
}

func (l *layerRewrap) clear() {
	if l.key != nil {
		l.key.Clear()
	}
}

// action is what happens to a wrapped key.
type action int

const (
	keep action = iota
	drop
	renew // with the current version of its own KEK
	move  // to the KEK that was named
)

// annotations returns the annotations of recipients that the layer is to have.
func (l *layerRewrap) annotations(ctx context.Context) (map[string]string, error) {
	all := make(map[string][]value)
	actions := make(map[*wrapped]action)
	var inOrder []*wrapped
	for _, scheme := range schemesOf(l.desc.Annotations) {
		all[scheme] = values(scheme, l.desc.Annotations[keysPrefix+scheme])
		for _, v := range all[scheme] {
			for i := range v.keys {
				inOrder = append(inOrder, &v.keys[i])
			}
		}
	}
	if len(inOrder) == 0 {
		return nil, errors.New("it has no recipients, so nobody can decrypt it")
	}
	if len(l.Remove) == 0 {
		if err := processor.CheckWrappedKeys(l.desc.Annotations); err != nil {
			return nil, err
		}
	}
	left := 0
	for _, k := range inOrder {
		a, err := l.plan(ctx, k, inOrder)
		if err != nil {
			return nil, err
		}
		if actions[k] = a; a != drop && k.err == nil {
			left++
		}
	}
	add := l.toAdd(actions)
	if left == 0 && len(add) == 0 {
		return nil, errors.New("no recipient would be left, and nobody could ever decrypt it")
	}
	if err := l.learnKey(ctx, inOrder, actions, len(add) > 0); err != nil {
		return nil, err
	}
	for _, k := range inOrder {
		var err error
		switch actions[k] {
		case renew:
			actions[k], err = l.wrapFor(ctx, k, k.KEK, true)
		case move:
			actions[k], err = l.wrapFor(ctx, k, l.To, false)
		}
		if err != nil {
			return nil, err
		}
	}
	out := make(map[string]string)
	for scheme, vs := range all {
		if text := l.join(vs, actions); text != "" {
			out[keysPrefix+scheme] = text
		}
	}
	if len(add) == 0 {
		return out, nil
	}
	return l.key.Wrap(ctx, processor.Recipients{Keys: l.Keys, Parameters: add}, out)
}

// plan returns what happens to k, which is one of all.
func (l *layerRewrap) plan(ctx context.Context, k *wrapped, all []*wrapped) (action, error) {
	for _, rec := range l.Remove {
		if rec.includes(k.Recipient) {
			l.find(rec)
			return drop, nil
		}
	}
	anew := l.Add == nil && len(l.Remove) == 0 // each, if no KEK is named
	switch {
	case k.err != nil && (anew || l.From != ""):
		return keep, fmt.Errorf("%s is damaged, or of a later version (if it is damaged, remove it): %w", k, k.err)
	case k.json == nil:
		if kek, _, ok := wireformat.ParsePluginKID(k.KEK); ok && l.adds(Recipient{Scheme: k.Scheme, KEK: kek}) {
			return drop, nil // the one that is added replaces it
		}
		return keep, nil
	case l.From != "" && k.KEK == "":
		return l.planUnnamed(ctx, k, all)
	case l.From != "" && k.KEK == l.From:
		l.find(Recipient{KEK: l.From})
		if l.From == l.To {
			return renew, nil
		}
		return move, nil
	case k.method == wireformat.MethodAge && l.adds(k.Recipient):
		return drop, nil // the one that is added replaces it
	case k.method == wireformat.MethodAge:
		return keep, nil // there are no versions
	case k.KEK != "" && l.adds(k.Recipient):
		return renew, nil
	case !anew || l.From != "":
		return keep, nil
	case k.KEK == "":
		return keep, fmt.Errorf("%s does not name its KEK, as in the original's format: name the KEK and the one that replaces it (--from and --to)", k)
	}
	return renew, nil
}

// planUnnamed moves a key that does not name its KEK, if that is From. If it is not, and
// no other key is From's, that is an error, since the caller must have meant this one.
func (l *layerRewrap) planUnnamed(ctx context.Context, k *wrapped, all []*wrapped) (action, error) {
	named := slices.ContainsFunc(all, func(k *wrapped) bool { return k.KEK == l.From })
	params := make(map[string][][]byte)
	if l.Keys.Private != nil {
		maps.Copy(params, l.Keys.Private.Parameters)
	}
	params[strings.TrimPrefix(k.Scheme, providerScheme)] = [][]byte{[]byte(l.From)}
	keys := l.Keys
	keys.Private = &config.DecryptConfig{Parameters: params}
	key, err := l.unwrap(ctx, k, keys)
	switch {
	case err != nil && (!named || ctx.Err() != nil):
		return keep, fmt.Errorf("%s does not name its KEK, and it does not unwrap with %q: %w", k, l.From, err)
	case err != nil:
		return keep, nil
	}
	l.find(Recipient{KEK: l.From})
	return move, l.accept(k, key)
}

func (l *layerRewrap) find(rec Recipient) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.found[rec] = true
}

// adds reports whether a KEK is among the recipients to add.
func (l *layerRewrap) adds(rec Recipient) bool {
	name, ok := strings.CutPrefix(rec.Scheme, providerScheme)
	return ok && slices.ContainsFunc(l.Add[name], func(kek []byte) bool { return string(kek) == rec.KEK })
}

// toAdd returns the recipients to add that are none yet.
func (l *layerRewrap) toAdd(actions map[*wrapped]action) map[string][][]byte {
	add := maps.Clone(l.Add)
	for k, a := range actions {
		name, _ := strings.CutPrefix(k.Scheme, providerScheme)
		becomes := k.KEK
		if a == move {
			becomes = l.To
		}
		if a != renew && a != move || len(add[name]) == 0 {
			continue
		}
		add[name] = slices.DeleteFunc(slices.Clone(add[name]), func(kek []byte) bool { return string(kek) == becomes })
		if len(add[name]) == 0 {
			delete(add, name)
		}
	}
	return add
}

// maxCompared bounds the KEKs of a layer that are not wrapped for anew, which are
// unwrapped only to compare the keys.
const maxCompared = 256

// learnKey unwraps the layer key, if anything changes, from each recipient that is
// wrapped anew for its own KEK, and from each that is moved or dropped, or stays,
// if the caller can. All must hold the same key: an attacker who can write to the registry
// could put the key of another image first, and the right one would be lost.
func (l *layerRewrap) learnKey(ctx context.Context, inOrder []*wrapped, actions map[*wrapped]action, needed bool) error {
	if !needed && !slices.ContainsFunc(inOrder, func(k *wrapped) bool { return actions[k] != keep }) {
		return nil
	}
	var first error
	optional := 0
	for _, k := range inOrder {
		if k.json == nil {
			continue
		}
		if actions[k] == keep || actions[k] == drop {
			// Anyone can add more than a broker has time for.
			if optional++; optional > maxCompared {
				return fmt.Errorf("%w: it is wrapped for more than %d KEKs besides those that change", ErrLimit, maxCompared)
			}
		}
		key, err := l.unwrap(ctx, k, l.Keys)
		switch {
		case err == nil:
			if err := l.accept(k, key); err != nil {
				return err
			}
		case actions[k] == renew:
			return fmt.Errorf("%s can't be wrapped anew, since it does not unwrap (move other KEKs one by one, or remove it): %w", k, err)
		case ctx.Err() != nil:
			return err
		case first == nil:
			first = err
		}
	}
	if l.key != nil {
		return nil
	}
	var err error
	if l.key, err = processor.Unwrap(ctx, l.Keys, l.desc); err != nil && first != nil {
		return first
	}
	return err
}

// unwrap unwraps the layer key from k alone.
func (l *layerRewrap) unwrap(ctx context.Context, k *wrapped, keys processor.Keys) (*processor.LayerKey, error) {
	return unwrapFrom(ctx, k, keys, l.desc)
}

// accept takes the key that k holds as the layer key, or compares it with that.
func (l *layerRewrap) accept(k *wrapped, key *processor.LayerKey) error {
	if l.key == nil {
		l.key = key
		return nil
	}
	defer key.Clear()
	// Earlier versions wrap a key without what is sealed. A seal that one recipient alone has
	// is not wrapped for the others: anybody may have wrapped it with a public key.
	if l.key.Sealed == nil || key.Sealed == nil {
		l.key.Sealed, key.Sealed = nil, nil
	}
	if !l.key.Equal(key) {
		return fmt.Errorf("%s has a different layer key than the other recipients: one of them was tampered with", k)
	}
	return nil
}

// wrapFor replaces k by the layer key wrapped for a KEK, and returns what happens to k
// then. It stays as it is if newer is set and the KEK's version is no newer.
func (l *layerRewrap) wrapFor(ctx context.Context, k *wrapped, kek string, newer bool) (action, error) {
	if l.fresh[Recipient{Scheme: k.Scheme, KEK: kek}] {
		return drop, nil
	}
	name := strings.TrimPrefix(k.Scheme, providerScheme)
	out, err := l.key.Wrap(ctx, processor.Recipients{Keys: l.Keys, Parameters: map[string][][]byte{name: {[]byte(kek)}}}, nil)
	if err != nil {
		return keep, err
	}
	got, err := pilots(k.Scheme, out[keysPrefix+k.Scheme])
	if err != nil || len(got) != 1 || got[0].KEK != kek && got[0].KEK != "" {
		return keep, fmt.Errorf("key provider %q was asked to wrap for KEK %q and returned something else", name, kek)
	}
	if newer && got[0].KEK == k.KEK && got[0].Version <= k.Version {
		return keep, nil
	}
	if newer {
		// The key that it had unwrapped, so this one has to.
		key, err := l.unwrap(ctx, &got[0], l.Keys)
		if err != nil {
			return keep, fmt.Errorf("%s was wrapped for anew, and the result does not unwrap: %w", k, err)
		}
		if err := l.accept(&got[0], key); err != nil {
			return keep, err
		}
	}
	*k = got[0]
	l.fresh[Recipient{Scheme: k.Scheme, KEK: kek}] = true
	return renew, nil
}

// join returns the annotation that values make after the actions. Values that a fresh
// one replaces are left out.
func (l *layerRewrap) join(vs []value, actions map[*wrapped]action) string {
	var texts []string
	for _, v := range vs {
		var keys []wrapped
		same := true
		for i := range v.keys {
			k := &v.keys[i]
			old := actions[k] == keep && l.fresh[Recipient{Scheme: k.Scheme, KEK: k.KEK}]
			same = same && actions[k] == keep && !old
			if actions[k] != drop && !old {
				keys = append(keys, *k)
			}
		}
		switch {
		case same:
			texts = append(texts, v.text)
		case len(keys) > 0:
			texts = append(texts, newValue(keys))
		}
	}
	return strings.Join(texts, ",")
}
