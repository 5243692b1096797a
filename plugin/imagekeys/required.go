package imagekeys

import (
	"context"
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
	for _, rule := range found {
		for _, doc := range docs {
			for _, p := range doc.parts {
				if err := r.checkPart(ctx, rule, p); err != nil {
					return fmt.Errorf("pilot's setting must-be-encrypted: %s, and this one is not: %w: push the encrypted image again, or find out who has replaced it: %w", rule, err, errdefs.ErrFailedPrecondition)
				}
			}
		}
	}
	return nil
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
	if isFor(rule, known) {
		return nil
	}
	if slices.ContainsFunc(known.Blobs, func(b layerkeys.Blob) bool { return b.Basis == layerkeys.Claimed }) {
		if err := r.proveClaims(ctx, p, known); err != nil {
			return err
		}
		if known, _ = r.conf.Record.Layer(p.diffID); isFor(rule, known) {
			return nil
		}
	}
	return fmt.Errorf("layer %s is encrypted for %s", p.layers[0].desc.Digest, openers(rule, known))
}

// isFor reports whether a KEK of a rule has opened a layer, wrapped with the KEK itself.
// That a manifest claims so is not enough.
func isFor(rule mustencrypt.Rule, known layerkeys.Layer) bool {
	return slices.ContainsFunc(known.Blobs, func(b layerkeys.Blob) bool {
		return b.Basis != layerkeys.Claimed && slices.ContainsFunc(b.KEKs, func(k KEK) bool {
			return rule.Allows(k.ID) && !slices.Contains(b.Public, k)
		})
	})
}

// proveClaims reads the layers that an image has for a diff ID, of which nothing is known
// but what manifests claim, and records which keys open them.
func (r *Resolver) proveClaims(ctx context.Context, p part, known layerkeys.Layer) error {
	ctx, cancel := context.WithTimeout(ctx, proofWait)
	defer cancel()
	for _, l := range p.layers {
		err := r.proveBlob(ctx, p.diffID, known, l)
		if errdefs.IsNotFound(err) {
			ns, _ := namespaces.Namespace(ctx)
			err = fmt.Errorf("containerd does not have it any more: fetch it with \"ctr -n %s content fetch IMAGE\" (%w)", ns, err)
		}
		if err != nil {
			return fmt.Errorf("layer %s was unpacked without a record of the key that opened it: %w", l.desc.Digest, err)
		}
		if proven, ok := r.conf.Record.Layer(p.diffID); ok {
			r.learn(ctx, p.diffID, proven, l)
		}
	}
	return nil
}

// openers describes what opens a layer that no KEK of a rule does.
func openers(rule mustencrypt.Rule, known layerkeys.Layer) string {
	l, _ := decrypted("", known)
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
		if rule.Allows(k.ID) {
			name += " with its public key, as anybody can"
		}
		names = append(names, name)
	}
	return strings.Join(names, ", ")
}
