package plugin

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/layerkeys"
	"github.com/ctrlplane/pilot/internal/mustencrypt"
	"github.com/ctrlplane/pilot/processor"
)

// record notes which key has opened a layer that was decrypted, verified and unpacked. It
// returns an error if that can't be saved: containerd would share the layer with images that
// need no key. plain is the digest of the plain blob, or "".
func (d *Differ) record(desc ocispec.Descriptor, key *processor.LayerKey, applied ocispec.Descriptor, plain digest.Digest) error {
	if d.conf.Record == nil {
		return nil
	}
	blob := layerkeys.Opened(desc.Digest, layerkeys.Decrypted, key.OpenedBy.Vouching(plain, applied.Digest), key.Fingerprint())
	blob.Plain = plain
	if !isErofs(desc.MediaType) {
		blob.Size = applied.Size
	}
	if err := d.conf.Record.Add(applied.Digest, blob); err != nil {
		return fmt.Errorf("the layer is not unpacked, as pilot can't record which key it needs: %w", err)
	}
	return nil
}

// rules returns those of the setting must-be-encrypted.
func (d *Differ) rules() mustencrypt.Rules {
	if d.conf.Rules == nil {
		return nil
	}
	return d.conf.Rules()
}

// rulesFor returns the rules of must-be-encrypted that are for all repositories which
// containerd has fetched a layer from: it has to meet those of one. The differ has the layer
// alone, and not the image's name: a layer that came from another repository too may be of an
// image that no rule is for.
func (d *Differ) rulesFor(ctx context.Context, desc ocispec.Descriptor) ([]mustencrypt.Alternative, error) {
	rules := d.rules()
	if len(rules) == 0 {
		return nil, nil
	}
	info, err := d.store.Info(ctx, desc.Digest)
	if err != nil {
		return nil, err
	}
	return rules.ForAll(mustencrypt.Sources(info.Labels)), nil
}

// mayBePlain returns an error if a plain layer has to be encrypted.
func (d *Differ) mayBePlain(ctx context.Context, desc ocispec.Descriptor) error {
	alternatives, err := d.rulesFor(ctx, desc)
	if err != nil || len(alternatives) == 0 {
		return err
	}
	return mustBeEncrypted(alternatives[0].Rules[0], alternatives[0].Repository, "it is plain")
}

// isForRules returns an error if a layer has to be encrypted for other KEKs than the one that
// has opened it, and the others that do. If it returns none, it is certain only once the
// layer was decrypted, so then isAsWrapped is called with its content: the digest of the
// plain blob, and that of the uncompressed layer.
func (d *Differ) isForRules(ctx context.Context, desc ocispec.Descriptor, key *processor.LayerKey) (isAsWrapped func(content ...digest.Digest) error, err error) {
	alternatives, err := d.rulesFor(ctx, desc)
	if err != nil || len(alternatives) == 0 {
		return func(...digest.Digest) error { return nil }, err
	}
	openers := []processor.Opener{key.OpenedBy}
	met, by, err := firstMet(alternatives, openers)
	if err != nil {
		// Those of the same key, and of the same digest that is wrapped with it.
		others, _ := d.keys.Openers(ctx, d.conf.Keys, desc, key.Equal)
		if met, by, err = firstMet(alternatives, append(openers, others...)); err != nil {
			return nil, err
		}
	}
	return func(content ...digest.Digest) error {
		if by.Vouching(content...).Vouches {
			return nil
		}
		why := mustencrypt.OtherContent
		if by.Digest == "" {
			why = mustencrypt.NoDigest
		}
		return mustBeEncrypted(met.Rules[0], met.Repository, fmt.Sprintf("it is opened by %s, %s", describe(by), why))
	}, nil
}

// firstMet returns the first alternative each rule of which is content with one of the
// openers, and an opener that one is content with. The error is that of the first of all.
func firstMet(alternatives []mustencrypt.Alternative, openers []processor.Opener) (met mustencrypt.Alternative, by processor.Opener, err error) {
	for _, a := range alternatives {
		i := slices.IndexFunc(a.Rules, func(rule mustencrypt.Rule) bool {
			j := slices.IndexFunc(openers, func(o processor.Opener) bool { return o.KEK != "" && !o.Public && rule.Allows(o.KEK) })
			if j >= 0 {
				by = openers[j]
			}
			return j < 0
		})
		if i < 0 {
			return a, by, nil
		}
		if err == nil {
			err = mustBeEncrypted(a.Rules[i], a.Repository, "it is opened by "+describe(openers[0]))
		}
	}
	return met, by, err
}

func describe(by processor.Opener) string {
	switch {
	case by.KEK == "":
		return "a key that is none of the broker's KEKs"
	case by.Public:
		return fmt.Sprintf("KEK %q, and wrapped %s", by.KEK, mustencrypt.NotByRight)
	}
	return fmt.Sprintf("KEK %q", by.KEK)
}

func mustBeEncrypted(rule mustencrypt.Rule, repository, reason string) error {
	return fmt.Errorf("the setting must-be-encrypted says that %s. This layer was fetched from %s, and %s: push the encrypted image again, or find out who has replaced it: %w",
		rule, repository, reason, errdefs.ErrFailedPrecondition)
}
