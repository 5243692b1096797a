package keyprovider

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/aesgcm"
	"github.com/ctrlplane/pilot/internal/openedby"
	"github.com/ctrlplane/pilot/internal/wireformat"
	"github.com/ctrlplane/pilot/processor"
)

// KBSKEK is the KEK that a Key Broker Service (KBS) of Confidential Containers has under some
// URI.
type KBSKEK struct {
	ID      string
	Version int // from 1
}

// CoCo returns the key provider attestation-agent. It writes layer keys in the form that the
// guests of Confidential Containers read, and reads all that the [Provider] reads. current
// returns the Provider to use.
func CoCo(current func() *Provider) processor.KeyProvider { return coco{current} }

type coco struct{ current func() *Provider }

func (c coco) WrapKey(ctx context.Context, params [][]byte, layerKey []byte) ([]byte, error) {
	return c.current().wrapCoCo(ctx, params, layerKey)
}

// UnwrapKey ignores params: CoCo's own tools name a KBS in them.
func (c coco) UnwrapKey(ctx context.Context, _ [][]byte, annotation []byte) ([]byte, error) {
	return c.current().UnwrapKey(ctx, nil, annotation)
}

// errCoCoKEK is the error of a kid that names no KEK known here.
var errCoCoKEK = fmt.Errorf("%w: no KEK of copilot is known for it", ErrInput)

// kbsKEK returns the KEK that a canonical kid names.
func (p *Provider) kbsKEK(kid string) (KBSKEK, error) {
	if kek, ok := p.conf.KBSKEKs[kid]; ok {
		return kek, nil
	}
	if id, version, ok := wireformat.ParsePluginKID(kid); ok {
		return KBSKEK{id, version}, nil
	}
	if address := wireformat.KBSAddress(kid); address != "" {
		return KBSKEK{}, fmt.Errorf("kid %s: %w: it is of the KBS at %s: if that has a KEK of copilot there, add \"%s=KEK\" to kbs-keks", kid, errCoCoKEK, address, kid)
	}
	return KBSKEK{}, fmt.Errorf("kid %s: %w: add \"%s=KEK\" to kbs-keks", kid, errCoCoKEK, kid)
}

// cocoRecipient returns what a parameter of the key provider attestation-agent names: the
// canonical kid of a KEK, or the id of one. Parameters are kbs:///REPOSITORY/TYPE/TAG, a
// KEK's id, or as CoCo's own key provider has them: keyid=URI and others, with two colons
// between them.
func cocoRecipient(param string) (kid, kek string, err error) {
	fields := strings.Split(param, "::")
	if name, _, ok := strings.Cut(fields[0], "="); ok && slices.Contains([]string{"keyid", "keypath", "sample", "algorithm"}, name) {
		param = ""
		for _, field := range fields {
			name, value, _ := strings.Cut(field, "=")
			switch {
			case name == "keyid":
				param = value
			case name == "keypath":
				return "", "", errors.New("keypath names a KEK in a file, and pilot gets them from copilot: leave it out")
			case name == "sample" && value != "false":
				return "", "", errors.New("sample wraps with a key that everybody knows: leave it out, and name a KEK with keyid")
			case name == "algorithm" && value != wireformat.MethodCoCo:
				return "", "", fmt.Errorf("algorithm %.40q is not %s, and pilot writes no other", value, wireformat.MethodCoCo)
			case name != "sample" && name != "algorithm":
				return "", "", fmt.Errorf("%.40q is none of keyid and algorithm", name)
			}
		}
		if param == "" {
			return "", "", errors.New("keyid is missing")
		}
		kid, err = wireformat.CanonicalKID(param)
		return kid, "", err
	}
	if strings.HasPrefix(param, "kbs:") || strings.HasPrefix(param, "kbs+") || strings.HasPrefix(param, "/") {
		kid, err = wireformat.CanonicalKID(param)
		return kid, "", err
	}
	if wireformat.IsAgeRecipient(param) {
		return "", "", errors.New("a recipient of age is no KEK, and no guest has its key")
	}
	return "", param, checkNamed(param)
}

// wrapCoCo wraps a layer key with one KEK, for guests.
func (p *Provider) wrapCoCo(ctx context.Context, params [][]byte, layerKey []byte) (_ []byte, err error) {
	defer func(start time.Time) { p.metrics.request(ctx, opWrap, start, err) }(time.Now())
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if len(layerKey) == 0 {
		return nil, fmt.Errorf("%w: the layer key is empty", ErrInput)
	}
	if len(params) != 1 || string(params[0]) == "Enabled" { // as ocicrypt has none
		return nil, fmt.Errorf("%w: the annotation of Confidential Containers holds one KEK: name one, as in provider:%s:kbs:///default/key/team-a", ErrInput, wireformat.CoCoProvider)
	}
	kid, id, err := cocoRecipient(string(params[0]))
	if err != nil {
		return nil, fmt.Errorf("%w: recipient of Confidential Containers: %w", ErrInput, err)
	}
	kek := KBSKEK{ID: id}
	if kid != "" {
		if kek, err = p.kbsKEK(kid); err != nil {
			return nil, err
		}
	}
	start := time.Now()
	packet, version, err := p.sealCoCo(ctx, kek.ID, layerKey)
	if err != nil {
		if denies(err) {
			err = denied{err}
		}
		return nil, err
	}
	switch {
	case kid == "":
		if packet.KID, err = wireformat.PluginKID(kek.ID, version); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrInput, err)
		}
	case version != kek.Version && version != 0:
		// Old versions wrap nothing more, and a KBS has one key under one URI.
		return nil, fmt.Errorf("%w: %s is version %d of KEK %q, and its current version is %d: give the KBS that under another URI, add it to kbs-keks, and encrypt for it", ErrInput, kid, kek.Version, kek.ID, version)
	default:
		packet.KID = kid
	}
	p.done(ctx, opWrap, kek.ID, version, wireformat.MethodCoCo, start)
	return json.Marshal(packet)
}

// sealCoCo wraps a layer key with the current version of a KEK, locally, or at the broker if
// the KEK is not exported.
func (p *Provider) sealCoCo(ctx context.Context, id string, layerKey []byte) (wireformat.CoCoPacket, int, error) {
	if p.conf.Format == FormatCopilot {
		return p.sealCoCoAtBroker(ctx, id, layerKey)
	}
	packet := wireformat.CoCoPacket{WrapType: wireformat.MethodCoCo}
	kek, err := p.keks.latest(ctx, id)
	if errors.Is(err, client.ErrNotExported) {
		return p.sealCoCoAtBroker(ctx, id, layerKey)
	}
	if err != nil {
		return packet, 0, err
	}
	defer clear(kek.Key)
	if len(kek.Key) != wireformat.KEKSize {
		return packet, 0, fmt.Errorf("%w: KEK %q has %d bytes, and %s takes %d", ErrInput, id, len(kek.Key), wireformat.MethodCoCo, wireformat.KEKSize)
	}
	aead, err := aesgcm.New(kek.Key)
	if err != nil {
		return packet, 0, err
	}
	sealed := aead.Seal(nil, nil, layerKey, nil)
	packet.IV, packet.WrappedData = sealed[:wireformat.IVSize], sealed[wireformat.IVSize:]
	return packet, kek.Version, nil
}

func (p *Provider) sealCoCoAtBroker(ctx context.Context, id string, layerKey []byte) (_ wireformat.CoCoPacket, version int, err error) {
	defer func(start time.Time) { p.metrics.asked(ctx, "wrap", start, err) }(time.Now())
	w, err := p.broker.WrapCoCo(ctx, id, layerKey)
	return wireformat.CoCoPacket{WrapType: wireformat.MethodCoCo, IV: w.IV, WrappedData: w.Key}, w.Version, err
}

// unwrapCoCo unwraps a layer key that was wrapped for guests. allowed are the KEKs that the
// caller names, if any.
func (p *Provider) unwrapCoCo(ctx context.Context, annotation []byte, allowed []string) ([]byte, error) {
	packet, err := wireformat.ParseCoCoPacket(annotation)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInput, err)
	}
	found, err := p.kbsKEK(packet.KID)
	if err != nil {
		return nil, err
	}
	if len(allowed) > 0 && !slices.Contains(allowed, found.ID) {
		return nil, fmt.Errorf("%w: it is wrapped with KEK %q, and the key given is %q", ErrWrongKEK, found.ID, strings.Join(allowed, ", "))
	}
	start := time.Now()
	layerKey, version, err := p.openCoCo(ctx, found, packet)
	if err != nil {
		if denies(err) {
			err = denied{err}
		}
		return nil, err
	}
	p.done(ctx, opUnwrap, found.ID, version, wireformat.MethodCoCo, start)
	openedby.Report(ctx, openedby.KEK{ID: found.ID, Version: version, Method: wireformat.MethodCoCo})
	return layerKey, nil
}

// openCoCo opens a packet with a KEK, locally, or at the broker if the KEK is not exported.
func (p *Provider) openCoCo(ctx context.Context, found KBSKEK, packet wireformat.CoCoPacket) ([]byte, int, error) {
	kek, err := p.keks.get(ctx, found.ID, found.Version)
	if errors.Is(err, client.ErrNotExported) {
		optsdata, kek, err := p.unwrapAtBroker(ctx, wireformat.Annotation{
			Method: wireformat.MethodCoCo, KEKID: found.ID, KEKVersion: found.Version, IV: packet.IV, WrappedKey: packet.WrappedData,
		})
		if errors.Is(err, client.ErrRejected) {
			err = fmt.Errorf("kid %s: %w: a copilot from before it knew %s rejects all such keys: is it upgraded?", packet.KID, err, wireformat.MethodCoCo)
		}
		return optsdata, kek.Version, err
	}
	if err != nil {
		return nil, 0, fmt.Errorf("kid %s: %w", packet.KID, err)
	}
	defer clear(kek.Key)
	if len(kek.Key) != wireformat.KEKSize {
		return nil, 0, fmt.Errorf("%w: kid %s: KEK %q has %d bytes, and %s takes %d", ErrWrongKEK, packet.KID, found.ID, len(kek.Key), wireformat.MethodCoCo, wireformat.KEKSize)
	}
	aead, err := aesgcm.New(kek.Key)
	if err != nil {
		return nil, 0, fmt.Errorf("KEK %q: %w", found.ID, err)
	}
	optsdata, err := aead.Open(nil, nil, slices.Concat(packet.IV, packet.WrappedData), nil)
	if err != nil {
		return nil, 0, fmt.Errorf("%w: kid %s: KEK %q version %d %w", ErrWrongKEK, packet.KID, found.ID, kek.Version, errWrongKEK)
	}
	return optsdata, kek.Version, nil
}
