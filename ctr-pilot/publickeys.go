package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/publickek"
	"github.com/ctrlplane/pilot/internal/wireformat"
	"github.com/ctrlplane/pilot/keyprovider"
	"github.com/ctrlplane/pilot/keyprovider/brokerconfig"
	"github.com/ctrlplane/pilot/processor"
)

// hpkePrefix begins recipients that are files of public halves of KEKs.
const hpkePrefix = "hpke:"

// publicRecipients returns the public keys of the command's recipients hpke:FILE, by those,
// and the name of the key provider that unwraps what is wrapped for them.
func publicRecipients(cmd *cli.Command) (keys map[string]publickek.PublicKey, provider string, err error) {
	var conf brokerconfig.Settings
	for _, r := range cmd.StringSlice("recipient") {
		name, ok := strings.CutPrefix(r, hpkePrefix)
		if !ok {
			continue
		}
		if keys == nil {
			keys = make(map[string]publickek.PublicKey)
			if conf, err = brokerconfig.Read(cmd); err != nil {
				return nil, "", err
			}
			provider = ownName(conf.ProviderName)
		}
		roots, err := conf.PublicKeysRoots()
		if err != nil {
			return nil, "", fmt.Errorf("recipient %s: %w", r, err)
		}
		if keys[r], err = publickek.Read(name, roots); err != nil {
			return nil, "", fmt.Errorf("recipient %s: %w", r, err)
		}
	}
	return keys, provider, nil
}

// ownName returns the first name of pilot's key provider that is not that of Confidential
// Containers, whose guests read no public keys.
func ownName(names []string) string {
	for _, name := range names {
		if name != wireformat.CoCoProvider {
			return name
		}
	}
	return "pilot"
}

// withPublicKeys returns key providers, with that for the public keys of the command's
// recipients, if there are some.
func withPublicKeys(cmd *cli.Command, all map[string]processor.KeyProvider, missing error) (map[string]processor.KeyProvider, error) {
	keys, name, err := publicRecipients(cmd)
	if err != nil {
		return all, err
	}
	if len(keys) == 0 {
		return all, missing
	}
	own := make(map[string]publickek.PublicKey)
	for _, key := range keys {
		if key.Version > own[key.ID].Version {
			own[key.ID] = key
		}
	}
	p := &publicProvider{ids: slices.Collect(maps.Keys(own)), next: all[name], missing: missing}
	p.own = keyprovider.New(nil, keyprovider.Config{Name: name, PublicKey: func(id string) (*publickek.PublicKey, error) {
		key := own[id]
		return &key, nil
	}})
	all = maps.Clone(all)
	if all == nil {
		all = make(map[string]processor.KeyProvider)
	}
	all[name] = p
	return all, missing
}

// publicProvider wraps for public keys, and leaves the rest to another key provider.
type publicProvider struct {
	own     *keyprovider.Provider
	ids     []string              // of the KEKs that own wraps for
	next    processor.KeyProvider // may be nil
	missing error                 // why it is, if that is known
}

// WrapKey wraps for each recipient.
func (p *publicProvider) WrapKey(ctx context.Context, params [][]byte, layerKey []byte) ([]byte, error) {
	var own, others [][]byte
	for _, param := range params {
		if slices.Contains(p.ids, string(param)) {
			own = append(own, param)
		} else {
			others = append(others, param)
		}
	}
	if len(others) == 0 {
		return p.own.WrapKey(ctx, own, layerKey)
	}
	if p.next == nil {
		return nil, p.absent()
	}
	first, err := p.next.WrapKey(ctx, others, layerKey)
	if err != nil || len(own) == 0 {
		return first, err
	}
	second, err := p.own.WrapKey(ctx, own, layerKey)
	if err != nil {
		return nil, err
	}
	return joinAnnotations(first, second)
}

// UnwrapKey leaves it to the other key provider.
func (p *publicProvider) UnwrapKey(ctx context.Context, params [][]byte, annotation []byte) ([]byte, error) {
	if p.next == nil {
		return nil, p.absent()
	}
	return p.next.UnwrapKey(ctx, params, annotation)
}

func (p *publicProvider) absent() error {
	if p.missing != nil {
		return fmt.Errorf("no broker is known here: %w", p.missing)
	}
	return errors.New("no broker is known here")
}

// joinAnnotations returns one annotation of pilot's with the keys of several.
func joinAnnotations(annotations ...[]byte) ([]byte, error) {
	var all []wireformat.Annotation
	for _, b := range annotations {
		list, err := wireformat.ParseAnnotation(b)
		if err != nil {
			return nil, err
		}
		all = append(all, list...)
	}
	b, err := json.Marshal(all)
	if err == nil {
		_, err = wireformat.ParseAnnotation(b) // which has limits
	}
	return b, err
}
