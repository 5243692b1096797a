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
				if err := r.checkPart(rule, p); err != nil {
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
func (r *Resolver) checkPart(rule mustencrypt.Rule, p part) error {
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
	for _, b := range known.Blobs {
		for _, k := range b.KEKs {
			if rule.Allows(k.ID) && !slices.Contains(b.Public, k) {
				return nil
			}
		}
	}
	return fmt.Errorf("layer %s is encrypted for %s", p.layers[0].desc.Digest, openers(known))
}

// openers describes what opens a layer.
func openers(known layerkeys.Layer) string {
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
		names = append(names, fmt.Sprintf("KEK %q", k.ID))
	}
	return strings.Join(names, ", ")
}
