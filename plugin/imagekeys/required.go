package imagekeys

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/ctrlplane/pilot/internal/layerkeys"
	"github.com/ctrlplane/pilot/internal/mustencrypt"
)

// CheckEncrypted returns an error if the setting must-be-encrypted is for an image in
// containerd's namespace ns, and not all its layers are encrypted as a rule says. The error
// is errdefs.ErrFailedPrecondition, and says which rule and what to do. names are further
// names under which the image was asked for, such as the one in a pod's specification.
//
// If no name says which repository the image is of, those count that containerd has fetched
// it from.
func (r *Resolver) CheckEncrypted(ctx context.Context, ns string, image Image, names ...string) error {
	rules := r.conf.Rules()
	if len(rules) == 0 {
		return nil
	}
	ctx = namespaces.WithNamespace(ctx, ns)
	var repositories []string
	var found []mustencrypt.Rule
	for _, name := range append(slices.Clip(names), image.Name) {
		// containerd's own name of an image is that of its configuration, a digest alone.
		if named, err := reference.ParseNormalizedNamed(name); err == nil && digest.Digest(name).Validate() != nil {
			repositories = append(repositories, named.Name())
		}
	}
	for _, repository := range repositories {
		found = append(found, rules.For(repository)...)
	}
	if len(repositories) > 0 && len(found) == 0 {
		return nil
	}
	if err := r.Begin(ctx); err != nil {
		return err
	}
	target, docs, err := r.read(ctx, image)
	if err != nil {
		return err
	}
	if len(repositories) == 0 {
		info, err := r.conf.Client.ContentStore().Info(ctx, target)
		if err != nil {
			return err
		}
		for _, repository := range mustencrypt.Sources(info.Labels) {
			found = append(found, rules.ForSource(repository)...)
		}
	}
	waiting, cancel := context.WithTimeout(ctx, proofWait)
	defer cancel()
	var unread error // of the first layer that is being read
	for _, rule := range found {
		for _, doc := range docs {
			for _, p := range doc.parts {
				err := r.checkPart(waiting, rule, p)
				if err == nil {
					continue
				}
				err = fmt.Errorf("pilot's setting must-be-encrypted: %s, and this one is not: %w: push the encrypted image again, or find out who has replaced it: %w", rule, err, errdefs.ErrFailedPrecondition)
				if !errors.Is(err, errProving) {
					return err
				}
				unread = cmp.Or(unread, err) // the other layers are read meanwhile
			}
		}
	}
	return unread
}

// checkPart returns an error unless an image has a layer encrypted, as a rule says. That a
// manifest says so is not enough: what it says is encrypted is never read where there is a
// snapshot with the diff ID.
func (r *Resolver) checkPart(ctx context.Context, rule mustencrypt.Rule, p part) error {
	if len(p.layers) == 0 {
		return fmt.Errorf("its configuration names layer %s, and its manifest has none in its place", p.diffID)
	}
	for _, l := range p.layers {
		if !l.encrypted() {
			return fmt.Errorf("layer %s is plain", l.desc.Digest)
		}
	}
	known, ok := r.conf.Record.Layer(p.diffID)
	if !ok {
		return fmt.Errorf("layer %s was never decrypted here, and what is unpacked under its diff ID %s is not from an encrypted image", p.layers[0].desc.Digest, p.diffID)
	}
	if isFor(rule, known, p.layers) {
		return nil
	}
	if slices.ContainsFunc(known.Blobs, func(b layerkeys.Blob) bool { return isUnread(rule, b) }) {
		if err := r.proveClaims(ctx, p, known); err != nil {
			return err
		}
	}
	r.proveRecipients(ctx, p)
	if known, _ = r.conf.Record.Layer(p.diffID); isFor(rule, known, p.layers) {
		return nil
	}
	return fmt.Errorf("layer %s is encrypted for %s", p.layers[0].desc.Digest, openers(rule, known))
}

// isFor reports whether somebody has wrapped the content of a layer for a KEK of a rule, who
// may wrap for it. That a manifest claims so is not enough, nor that the KEK opens the layer:
// those who could decrypt another one can encrypt what they like under its key.
//
// Of a layer that was decrypted here it is known that it has the content of the diff ID. Of
// one that is mounted lazily that is known if it is what somebody has wrapped, so an image's
// own such layers have to be.
func isFor(rule mustencrypt.Rule, known layerkeys.Layer, own []layer) bool {
	found := false
	for _, b := range known.Blobs {
		vouched := slices.ContainsFunc(b.Vouched, func(k KEK) bool { return rule.Allows(k.ID) })
		if b.Basis == layerkeys.Sealed && !vouched && slices.ContainsFunc(own, func(l layer) bool { return l.desc.Digest == b.Digest }) {
			return false
		}
		found = found || vouched && b.Basis != layerkeys.Claimed
	}
	return found
}

// isUnread reports whether reading a layer may show that it is for a KEK of a rule.
func isUnread(rule mustencrypt.Rule, b layerkeys.Blob) bool {
	return b.Basis == layerkeys.Claimed || b.Plain == "" && slices.ContainsFunc(b.KEKs, func(k KEK) bool { return rule.Allows(k.ID) })
}

// proveClaims reads the layers that an image has for a diff ID, of which it is not known
// whether they are what was encrypted for the KEKs that open them, and records what they are.
func (r *Resolver) proveClaims(ctx context.Context, p part, known layerkeys.Layer) error {
	for _, l := range p.layers {
		err := r.proveBlob(ctx, p.diffID, known, l)
		if errdefs.IsNotFound(err) {
			ns, _ := namespaces.Namespace(ctx)
			err = fmt.Errorf("containerd does not have it: fetch it with \"ctr -n %s content fetch IMAGE\" (%w)", ns, err)
		}
		if err != nil {
			return fmt.Errorf("layer %s %s: %w", l.desc.Digest, unknownContent(known, l), err)
		}
	}
	return nil
}

// proveRecipients tries the recipients that an image names of its own layers whose content is
// known: another than the one that has opened it may vouch for it.
func (r *Resolver) proveRecipients(ctx context.Context, p part) {
	known, _ := r.conf.Record.Layer(p.diffID)
	for _, l := range p.layers {
		for _, b := range known.Blobs {
			if b.Digest == l.desc.Digest && b.Plain != "" {
				r.addRecipients(ctx, p.diffID, l, b)
			}
		}
	}
}

// unknownContent describes a layer of which nothing shows that it is what was encrypted.
func unknownContent(known layerkeys.Layer, l layer) string {
	if isSealed(known, l) {
		return "is mounted lazily, and what is sealed of it is not wrapped with its key, so everybody who can decrypt it could have sealed that: " +
			"encrypt the plain image again with ctr-pilot, since earlier versions did not wrap it, or have pilot read the layer"
	}
	return "was unpacked without a record of the key that opened it, and of what is wrapped with that"
}

// isSealed reports whether a layer is mounted lazily, by what its key has sealed.
func isSealed(known layerkeys.Layer, l layer) bool {
	return slices.ContainsFunc(known.Blobs, func(b layerkeys.Blob) bool { return b.Basis == layerkeys.Sealed && b.Digest == l.desc.Digest })
}

// openers describes what opens a layer that no KEK of a rule does.
func openers(rule mustencrypt.Rule, known layerkeys.Layer) string {
	l := opened(known)
	if len(l.KEKs) == 0 {
		return "none of the broker's KEKs"
	}
	const most = 4
	var names []string
	for i, k := range l.KEKs {
		if i == most {
			names = append(names, fmt.Sprintf("%d more", len(l.KEKs)-i))
			break
		}
		name := fmt.Sprintf("KEK %q", k.ID)
		switch {
		case !rule.Allows(k.ID):
		case slices.Contains(l.Public, k):
			name += " " + mustencrypt.NotByRight
		default:
			name += ", " + mustencrypt.OtherContent
		}
		names = append(names, name)
	}
	return strings.Join(names, ", ")
}

// opened returns all that has opened a layer.
func opened(known layerkeys.Layer) (all layerkeys.Blob) {
	for _, b := range known.Blobs {
		if b.Basis != layerkeys.Claimed {
			all.Merge(b)
		}
	}
	return all
}
