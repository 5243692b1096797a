package image

import (
	"context"
	"maps"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/wireformat"
	"github.com/ctrlplane/pilot/processor"
)

// again wraps the key of a layer that is encrypted already for the recipients. A KEK that it
// is wrapped for already stays as it is, and is not added once more. If what is wrapped for
// it can't be unwrapped here, or is another key, the new one takes its place.
func (e *encryption) again(ctx context.Context, desc ocispec.Descriptor, key *processor.LayerKey) (map[string]string, error) {
	had, to := maps.Clone(desc.Annotations), e.to
	to.Parameters = maps.Clone(to.Parameters)
	for name, keks := range e.to.Parameters {
		scheme := providerScheme + name
		if had[keysPrefix+scheme] == "" {
			continue
		}
		is := map[string]bool{}
		named := func(kek string) bool {
			if id, _, ok := wireformat.ParsePluginKID(kek); ok {
				kek = id // of what is wrapped for guests
			}
			return kek != "" && slices.ContainsFunc(keks, func(k []byte) bool { return string(k) == kek })
		}
		var texts []string
		for _, v := range values(scheme, had[keysPrefix+scheme]) {
			keys := slices.DeleteFunc(slices.Clone(v.keys), func(k wrapped) bool {
				if !named(k.KEK) {
					return false
				}
				if is[k.KEK] || !holds(ctx, &k, e.to.Keys, desc, key) {
					return true
				}
				is[k.KEK] = true
				return false
			})
			if len(keys) == len(v.keys) {
				texts = append(texts, v.text)
			} else if len(keys) > 0 {
				texts = append(texts, newValue(keys))
			}
		}
		had[keysPrefix+scheme] = strings.Join(texts, ",")
		to.Parameters[name] = slices.DeleteFunc(slices.Clone(keks), func(kek []byte) bool { return is[string(kek)] })
		if len(to.Parameters[name]) == 0 {
			delete(to.Parameters, name)
		}
	}
	if len(to.Parameters) == 0 {
		maps.DeleteFunc(had, func(name, _ string) bool { return !strings.HasPrefix(name, keysPrefix) })
		return had, nil
	}
	return key.Wrap(ctx, to, had)
}

// holds reports whether k, which is a layer's, unwraps to its key.
func holds(ctx context.Context, k *wrapped, keys processor.Keys, desc ocispec.Descriptor, key *processor.LayerKey) bool {
	got, err := unwrapFrom(ctx, k, keys, desc)
	if err != nil {
		return false
	}
	defer got.Clear()
	return got.Equal(key)
}
