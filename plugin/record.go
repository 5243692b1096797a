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

// ruleFor returns a rule of must-be-encrypted that is for all repositories which containerd
// has fetched a layer from. It has the layer alone, and not the image's name: a layer that
// came from another repository too may be of an image that no rule is for.
func (d *Differ) ruleFor(ctx context.Context, desc ocispec.Descriptor) (rule mustencrypt.Rule, repository string, ok bool, err error) {
	rules := d.rules()
	if len(rules) == 0 {
		return rule, "", false, nil
	}
	info, err := d.store.Info(ctx, desc.Digest)
	if err != nil {
		return rule, "", false, err
	}
	rule, repository, ok = rules.ForAll(mustencrypt.Sources(info.Labels))
	return rule, repository, ok, nil
}

// mayBePlain returns an error if a plain layer has to be encrypted.
func (d *Differ) mayBePlain(ctx context.Context, desc ocispec.Descriptor) error {
	rule, repository, ok, err := d.ruleFor(ctx, desc)
	if err != nil || !ok {
		return err
	}
	return mustBeEncrypted(rule, repository, "it is plain")
}

// isForRule returns an error if a layer has to be encrypted for other KEKs than the one that
// has opened it, and the others that do. If it returns none, it is certain only once the
// layer was decrypted, so then isAsWrapped is called with its content: the digest of the
// plain blob, and that of the uncompressed layer.
func (d *Differ) isForRule(ctx context.Context, desc ocispec.Descriptor, key *processor.LayerKey) (isAsWrapped func(content ...digest.Digest) error, err error) {
	rule, repository, ok, err := d.ruleFor(ctx, desc)
	if err != nil || !ok {
		return func(...digest.Digest) error { return nil }, err
	}
	allows := func(o processor.Opener) bool { return o.KEK != "" && !o.Public && rule.Allows(o.KEK) }
	by := key.OpenedBy
	if !allows(by) {
		others, _ := d.keys.Openers(ctx, d.conf.Keys, desc, key.Equal)
		i := slices.IndexFunc(others, allows)
		if i < 0 {
			return nil, mustBeEncrypted(rule, repository, "it is opened by "+describe(by))
		}
		by = others[i]
	}
	return func(content ...digest.Digest) error {
		if by.Vouching(content...).Vouches {
			return nil
		}
		why := mustencrypt.OtherContent
		if by.Digest == "" {
			why = mustencrypt.NoDigest
		}
		return mustBeEncrypted(rule, repository, fmt.Sprintf("it is opened by %s, %s", describe(by), why))
	}, nil
}

func describe(by processor.Opener) string {
	switch {
	case by.KEK == "":
		return "a key that is none of the broker's KEKs"
	case by.Public:
		return fmt.Sprintf("KEK %q, and wrapped with its public key, as anybody can", by.KEK)
	}
	return fmt.Sprintf("KEK %q", by.KEK)
}

func mustBeEncrypted(rule mustencrypt.Rule, repository, reason string) error {
	return fmt.Errorf("the setting must-be-encrypted says that %s. This layer was fetched from %s, and %s: push the encrypted image again, or find out who has replaced it: %w",
		rule, repository, reason, errdefs.ErrFailedPrecondition)
}
