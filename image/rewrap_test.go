package image

import (
	"encoding/json"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/copilot/server/servertest"
	"github.com/ctrlplane/pilot/keyprovider"
	"github.com/ctrlplane/pilot/processor"
)

// kekOnly has the key providers of [newKEKs], and no private keys.
var kekOnly = processor.Keys{Providers: make(map[string]processor.KeyProvider)}

// newKEKs starts a broker that has KEKs, and pilot under the names pilot, second,
// original, which writes the original's format, and remote, which has the broker
// wrap.
func newKEKs(t testing.TB, ids ...string) server.Keys {
	t.Helper()
	dir := t.TempDir()
	address := servertest.Serve(t, server.Config{Dir: dir})
	keys, err := server.OpenKeys(t.Context(), server.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { keys.Close() })
	for _, id := range ids {
		if _, err := keys.Create(t.Context(), id, nil); err != nil {
			t.Fatal(err)
		}
	}
	broker, err := client.New(client.Config{URLs: []string{address}, Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"pilot", "second", "original", "remote"} {
		conf := keyprovider.Config{Name: name, CacheSize: 10}
		switch name {
		case "original":
			conf.Format = keyprovider.FormatOriginal
		case "remote":
			conf.Format = keyprovider.FormatCopilot
		}
		kekOnly.Providers[name] = keyprovider.New(broker, conf)
	}
	return keys
}

func rotate(t testing.TB, keys server.Keys, id string) {
	t.Helper()
	if _, err := keys.Rotate(t.Context(), id); err != nil {
		t.Fatal(err)
	}
}

// kek is what --recipient provider:NAME:KEK says, for several.
func kek(provider string, ids ...string) processor.Recipients {
	params := make([][]byte, len(ids))
	for i, id := range ids {
		params[i] = []byte(id)
	}
	return processor.Recipients{Keys: kekOnly, Parameters: map[string][][]byte{provider: params}}
}

// encrypted returns an image of two layers, encrypted for each of the recipients
// one after the other.
func (s *store) encrypted(recipients ...processor.Recipients) ocispec.Descriptor {
	s.t.Helper()
	a, b := s.put(ocispec.MediaTypeImageLayer, "layer a"), s.put(ocispec.MediaTypeImageLayer, "layer b")
	out := Result{Target: s.manifest(ociManifest, entry(a)+","+entry(b), "")}
	for _, ec := range recipients {
		var err error
		ec.Keys = s.dc
		if out, err = Encrypt(s.ctx, s, out.Target, ec, Options{}); err != nil {
			s.t.Fatal(err)
		}
	}
	return out.Target
}

// recipients returns those of each layer, in their order, as text.
func (s *store) recipients(target ocispec.Descriptor) string {
	s.t.Helper()
	layers, err := Layers(s.ctx, s, target, Options{})
	if err != nil {
		s.t.Fatal(err)
	}
	var all []string
	for _, l := range layers {
		all = append(all, joinRecipients(recipientsOf(l.Descriptor.Annotations)))
	}
	if slices.ContainsFunc(all, func(s string) bool { return s != all[0] }) {
		s.t.Errorf("the layers have recipients %q", all)
	}
	return strings.ReplaceAll(all[0], "provider:", "")
}

// edited changes a manifest.
func (s *store) edited(target ocispec.Descriptor, change func(m *ocispec.Manifest)) ocispec.Descriptor {
	s.t.Helper()
	var m ocispec.Manifest
	if err := json.Unmarshal([]byte(s.get(target)), &m); err != nil {
		s.t.Fatal(err)
	}
	change(&m)
	b, err := json.Marshal(m)
	if err != nil {
		s.t.Fatal(err)
	}
	return s.put(target.MediaType, string(b))
}

// TestRewrapFollowsTheRotationOfAKEK rotates a KEK and moves images to its new version. Nothing else of
// them changes, and no layer is there.
func TestRewrapFollowsTheRotationOfAKEK(t *testing.T) {
	keys := newKEKs(t, "team-a")
	s := newStore(t)
	pilots := regexp.MustCompile(`"org.opencontainers.image.enc.keys.provider.pilot":"[^"]*"`)
	others := regexp.MustCompile(`"digest": *"[^"]*"|"size": *[0-9]+|"vnd.docker.reference.digest":"[^"]*"`)
	for name, target := range testImages(s) {
		plain := target
		for _, ec := range []processor.Recipients{kek("pilot", "team-a"), s.ec} {
			ec.Keys = s.dc
			out, err := Encrypt(s.ctx, s, target, ec, Options{AllowPlain: true})
			if err != nil {
				t.Fatal(err)
			}
			target = out.Target
		}
		before := s.blobs()
		if out, err := Rewrap(s.ctx, s, target, Rewrapping{Keys: kekOnly}, Options{}); err != nil || out.Target.Digest != target.Digest || out.Layers != 0 || out.Encrypted == 0 || s.blobs() != before {
			t.Errorf("%s, nothing to do: %+v, %v", name, out, err)
		}
		rotate(t, keys, "team-a")

		// The same in a store that has no layers.
		alone := newStore(t)
		if err := copyDocuments(s, alone, target); err != nil {
			t.Fatal(err)
		}
		dry, err := Rewrap(s.ctx, alone, target, Rewrapping{Keys: kekOnly, DryRun: true}, Options{})
		if err != nil || dry.Layers == 0 || dry.Target.Digest == target.Digest {
			t.Errorf("%s, dry run: %+v, %v", name, dry, err)
		}
		if _, err := alone.Info(alone.ctx, dry.Target.Digest); err == nil {
			t.Errorf("%s: the dry run wrote %s", name, dry.Target.Digest)
		}
		out, err := Rewrap(s.ctx, alone, target, Rewrapping{Keys: kekOnly}, Options{})
		if err != nil || out.Layers != dry.Layers || len(out.Changes) != 1 || !regexp.MustCompile(`^provider:pilot:team-a@\d -> provider:pilot:team-a@\d$`).MatchString(out.Changes[0]) {
			t.Errorf("%s: %+v, %v", name, out, err)
			continue
		}
		if err := copyDocuments(alone, s, out.Target); err != nil {
			t.Fatal(err)
		}
		had, has := s.documents(target), s.documents(out.Target)
		for i := range had {
			if had[i] == has[i] && pilots.MatchString(had[i]) {
				t.Errorf("%s: document %d is as it was", name, i)
			}
			masked := func(s string) string {
				if strings.Contains(s, `"manifests"`) {
					s = others.ReplaceAllString(s, "")
				}
				return pilots.ReplaceAllString(s, "")
			}
			if masked(had[i]) != masked(has[i]) {
				t.Errorf("%s: document %d was\n%s\nand is\n%s", name, i, had[i], has[i])
			}
		}
		decrypted, err := Decrypt(s.ctx, s, out.Target, s.dc, Options{})
		if err != nil || decrypted.Target.Digest != plain.Digest {
			t.Errorf("%s: decrypted to %+v, %v, was %s", name, decrypted, err, plain.Digest)
		}
		// The KEK alone is enough.
		if _, err := Decrypt(s.ctx, s, out.Target, kekOnly, Options{}); err != nil {
			t.Errorf("%s: with the KEK alone: %v", name, err)
		}
		alone.noIngests()
	}
}

// copyDocuments copies an image's indexes and manifests.
func copyDocuments(from, to *store, target ocispec.Descriptor) error {
	for _, doc := range from.documents(target) {
		to.put(target.MediaType, doc)
	}
	return nil
}

// documents returns an image's indexes and manifests, the children last.
func (s *store) documents(desc ocispec.Descriptor) []string {
	doc := s.get(desc)
	all := []string{doc}
	var index ocispec.Index
	if err := json.Unmarshal([]byte(doc), &index); err != nil {
		s.t.Fatal(err)
	}
	for _, child := range index.Manifests {
		if _, err := s.Info(s.ctx, child.Digest); err == nil {
			all = append(all, s.documents(child)...)
		}
	}
	return all
}

// TestRecipientsChange changes recipients in each way. The KEKs a and b have
// version 2 by the time of the change, b from the beginning.
func TestRecipientsChange(t *testing.T) {
	keys := newKEKs(t, "a", "b", "c")
	rotate(t, keys, "b")
	s := newStore(t)
	jwe := s.ec
	one, two := processor.Recipients{Parameters: pgpRecipient(t, "one@example.com").ec}, processor.Recipients{Parameters: pgpRecipient(t, "two@example.com").ec}
	both := processor.Recipients{Parameters: map[string][][]byte{
		"gpg-recipients":     slices.Concat(one.Parameters["gpg-recipients"], two.Parameters["gpg-recipients"]),
		"gpg-pubkeyringfile": {slices.Concat(one.Parameters["gpg-pubkeyringfile"][0], two.Parameters["gpg-pubkeyringfile"][0])},
	}}
	remove := func(names ...string) (list []Recipient) {
		for _, name := range names {
			rec, err := ParseRecipient(name)
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, rec)
		}
		return list
	}
	images := []struct {
		name       string
		recipients []processor.Recipients
		how        Rewrapping
		want       string // recipients; "" if nothing changes
		err        string
		missing    string
	}{
		{"current", []processor.Recipients{kek("pilot", "b"), jwe}, Rewrapping{}, "", "", ""},
		{"jwe only", []processor.Recipients{jwe}, Rewrapping{}, "", "", ""},
		{"all", []processor.Recipients{kek("pilot", "a"), kek("pilot", "b"), jwe, kek("second", "a")}, Rewrapping{}, "jwe, pilot:a@2, pilot:b@2, second:a@2", "", ""},
		{"array", []processor.Recipients{kek("pilot", "b", "a")}, Rewrapping{}, "pilot:b@2, pilot:a@2", "", ""},
		{"twice", []processor.Recipients{kek("pilot", "a"), kek("pilot", "c"), kek("pilot", "a")}, Rewrapping{}, "pilot:a@2, pilot:c@1", "", ""},
		{"move", []processor.Recipients{kek("pilot", "c"), kek("pilot", "a"), jwe, kek("pilot", "b")}, Rewrapping{From: "a", To: "b"}, "jwe, pilot:c@1, pilot:b@2", "", ""},
		{"move in an array", []processor.Recipients{kek("pilot", "a", "c"), kek("second", "a")}, Rewrapping{From: "a", To: "b"}, "pilot:b@2, pilot:c@1, second:b@2", "", ""},
		{"move itself", []processor.Recipients{kek("pilot", "a"), kek("second", "a"), kek("pilot", "c")}, Rewrapping{From: "a", To: "a"}, "pilot:a@2, pilot:c@1, second:a@2", "", ""},
		{"move nothing", []processor.Recipients{kek("pilot", "a")}, Rewrapping{From: "b", To: "c"}, "", "", `KEK "b"`},
		{"move to nobody", []processor.Recipients{kek("pilot", "a")}, Rewrapping{From: "a", To: "d"}, "", "no such KEK", ""},
		{"move to nonsense", []processor.Recipients{kek("pilot", "a")}, Rewrapping{From: "a", To: "<>"}, "", "not allowed", ""},
		{"move halfway", []processor.Recipients{kek("pilot", "a")}, Rewrapping{From: "a"}, "", "need each other", ""},
		{"original", []processor.Recipients{kek("original", "a")}, Rewrapping{}, "", "provider:original does not name its KEK", ""},
		{"original, move", []processor.Recipients{kek("original", "a"), kek("pilot", "c")}, Rewrapping{From: "a", To: "b"}, "original, pilot:c@1", "", ""},
		{"original, move another", []processor.Recipients{kek("original", "a")}, Rewrapping{From: "b", To: "c"}, "", `does not unwrap with "b"`, ""},
		{"original beside it", []processor.Recipients{kek("original", "c"), kek("pilot", "a")}, Rewrapping{From: "a", To: "b"}, "original, pilot:b@2", "", ""},
		{"add", []processor.Recipients{kek("pilot", "a")}, Rewrapping{Add: jwe.Parameters}, "jwe, pilot:a@1", "", ""},
		{"add KEKs", []processor.Recipients{jwe, kek("pilot", "a")}, Rewrapping{Add: kek("pilot", "b", "c").Parameters}, "jwe, pilot:a@1, pilot:b@2, pilot:c@1", "", ""},
		{"add what is there", []processor.Recipients{kek("pilot", "a"), kek("pilot", "b")}, Rewrapping{Add: kek("pilot", "b").Parameters}, "", "", ""},
		{"add what is old", []processor.Recipients{kek("pilot", "a"), kek("pilot", "b")}, Rewrapping{Add: kek("pilot", "a", "c").Parameters}, "pilot:a@2, pilot:b@2, pilot:c@1", "", ""},
		{"add OpenPGP again", []processor.Recipients{jwe, one}, Rewrapping{Add: one.Parameters}, "jwe, pgp", "", ""},
		{"add OpenPGP to both", []processor.Recipients{jwe, one, two}, Rewrapping{Add: both.Parameters}, "jwe, pgp", "", ""},
		{"add OpenPGP of two", []processor.Recipients{jwe, both}, Rewrapping{Add: one.Parameters}, "jwe, pgp, pgp", "", ""},
		{"remove", []processor.Recipients{kek("pilot", "a"), kek("pilot", "b"), jwe}, Rewrapping{Remove: remove("provider:pilot:a", "jwe")}, "pilot:b@2", "", ""},
		{"remove of an array", []processor.Recipients{kek("pilot", "a", "b", "c")}, Rewrapping{Remove: remove("provider:pilot:b")}, "pilot:a@1, pilot:c@1", "", ""},
		{"remove a provider's", []processor.Recipients{kek("pilot", "a", "b"), kek("second", "c")}, Rewrapping{Remove: remove("provider:pilot")}, "second:c@1", "", ""},
		{"remove unnamed", []processor.Recipients{kek("original", "a"), kek("pilot", "b")}, Rewrapping{Remove: remove("provider:original")}, "pilot:b@2", "", ""},
		{"remove the last", []processor.Recipients{kek("pilot", "a"), jwe}, Rewrapping{Remove: remove("provider:pilot", "jwe")}, "", "no recipient would be left", ""},
		{"remove and add", []processor.Recipients{kek("pilot", "a")}, Rewrapping{Remove: remove("provider:pilot:a"), Add: kek("pilot", "b").Parameters}, "pilot:b@2", "", ""},
		{"remove what is not there", []processor.Recipients{kek("pilot", "a"), jwe}, Rewrapping{Remove: remove("provider:pilot:b", "pgp", "jwe")}, "pilot:a@1", "", "provider:pilot:b, pgp"},
		{"no key", []processor.Recipients{jwe}, Rewrapping{Keys: kekOnly, Add: kek("pilot", "b").Parameters}, "", "no private key was given", ""},
	}
	targets := make([]ocispec.Descriptor, len(images))
	for i, test := range images {
		s.dc.Private.Parameters["original"] = [][]byte{[]byte("a"), []byte("c")}
		targets[i] = s.encrypted(test.recipients...)
	}
	rotate(t, keys, "a")
	for i, test := range images {
		if test.how.Keys.Providers == nil {
			test.how.Keys = s.dc
		}
		before := s.blobs()
		out, err := Rewrap(s.ctx, s, targets[i], test.how, Options{})
		if test.err != "" {
			if err == nil || !strings.Contains(err.Error(), test.err) || s.blobs() != before {
				t.Errorf("%s: %v, want %q, and %d blobs more", test.name, err, test.err, s.blobs()-before)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
			continue
		}
		if got := strings.Join(out.Missing, ", "); got != test.missing {
			t.Errorf("%s: missing: %q, want %q", test.name, got, test.missing)
		}
		if test.want == "" {
			if out.Target.Digest != targets[i].Digest || out.Layers != 0 || s.blobs() != before {
				t.Errorf("%s: changed to %s", test.name, s.get(out.Target))
			}
			continue
		}
		if got := s.recipients(out.Target); got != test.want || out.Layers != 2 {
			t.Errorf("%s: recipients %s, want %s; %d layers", test.name, got, test.want, out.Layers)
		}
		if len(out.Changes) != 1 || len(out.Changes[0]) < len("+ pgp") {
			t.Errorf("%s: changes %q", test.name, out.Changes)
		}
		if _, err := Decrypt(s.ctx, s, out.Target, s.dc, Options{}); err != nil {
			t.Errorf("%s: decrypt: %v", test.name, err)
		}
	}
	s.noIngests()
}

// TestRewrapChangesOnlySelectedLayers rewraps one layer, and one platform.
func TestRewrapChangesOnlySelectedLayers(t *testing.T) {
	keys := newKEKs(t, "a")
	s := newStore(t)
	target := s.encrypted(kek("pilot", "a"))
	rotate(t, keys, "a")
	out, err := Rewrap(s.ctx, s, target, Rewrapping{Keys: kekOnly}, Options{Layers: []int{-1}})
	if err != nil || out.Layers != 1 || out.Encrypted != 1 {
		t.Errorf("%+v, %v", out, err)
	}
	layers, err := Layers(s.ctx, s, out.Target, Options{})
	if err != nil || recipientsOf(layers[0].Descriptor.Annotations)[0].Version != 1 || recipientsOf(layers[1].Descriptor.Annotations)[0].Version != 2 {
		t.Errorf("%+v, %v", layers, err)
	}
	if _, err := Rewrap(s.ctx, s, target, Rewrapping{Keys: kekOnly}, Options{Platforms: []ocispec.Platform{{OS: "linux", Architecture: "s390x"}}}); err == nil || !strings.Contains(err.Error(), "no platform linux/s390x") {
		t.Errorf("a platform that it does not have: %v", err)
	}
}

// TestRewrapForeignKey has somebody who can write to the registry put the wrapped
// key of another image in front of the right one. Whatever is done, the right one
// is not lost for it.
func TestRewrapForeignKey(t *testing.T) {
	newKEKs(t, "team-a", "team-b", "team-c")
	s := newStore(t)
	good, other := s.encrypted(kek("pilot", "team-a")), s.encrypted(kek("pilot", "team-c"))
	layers, err := Layers(s.ctx, s, other, Options{})
	if err != nil {
		t.Fatal(err)
	}
	const pilot = keysPrefix + "provider.pilot"
	target := s.edited(good, func(m *ocispec.Manifest) {
		for i := range m.Layers {
			m.Layers[i].Annotations[pilot] = layers[i].Descriptor.Annotations[pilot] + "," + m.Layers[i].Annotations[pilot]
		}
	})
	remove := []Recipient{{Scheme: "provider.pilot", KEK: "team-a"}}
	for name, how := range map[string]Rewrapping{
		"anew":           {},
		"move":           {From: "team-a", To: "team-b"},
		"add":            {Add: kek("pilot", "team-b").Parameters},
		"add and remove": {Add: kek("pilot", "team-b").Parameters, Remove: remove},
		"remove":         {Remove: remove},
	} {
		how.Keys = kekOnly
		if _, err := Rewrap(s.ctx, s, target, how, Options{}); err == nil || !strings.Contains(err.Error(), "has a different layer key than the other recipients") {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Nor is what is left only damaged.
	damaged := s.edited(good, func(m *ocispec.Manifest) {
		for i := range m.Layers {
			m.Layers[i].Annotations[pilot] += ",bm9uc2Vuc2U="
		}
	})
	if _, err := Rewrap(s.ctx, s, damaged, Rewrapping{Keys: kekOnly, Remove: remove}, Options{}); err == nil || !strings.Contains(err.Error(), "no recipient would be left") {
		t.Errorf("the last good one is removed: %v", err)
	}
	// Who is moved to and added is there once.
	out, err := Rewrap(s.ctx, s, good, Rewrapping{Keys: kekOnly, From: "team-a", To: "team-b", Add: kek("pilot", "team-b").Parameters}, Options{})
	if err != nil || s.recipients(out.Target) != "pilot:team-b@1" {
		t.Errorf("%s, %v", s.recipients(out.Target), err)
	}
}

// TestRewrapOfWhatAnEarlierVersionWrapped rewraps a lazy layer that has a recipient from an
// earlier version, which wrapped the key without the seal.
func TestRewrapOfWhatAnEarlierVersionWrapped(t *testing.T) {
	newKEKs(t, "a", "b", "c")
	s := newStore(t)
	good := s.mustEncrypt(s.lazyImage(build(t, allKinds(t))), kek("pilot", "a"), Options{}).Target
	key, err := processor.Unwrap(s.ctx, s.dc, s.layers(good)[0])
	if err != nil {
		t.Fatal(err)
	}
	defer key.Clear()
	older, err := key.WithSealed(nil).Wrap(s.ctx, processor.Recipients{Keys: kekOnly, Parameters: kek("pilot", "b").Parameters}, nil)
	if err != nil {
		t.Fatal(err)
	}
	const pilot = keysPrefix + "provider.pilot"
	target := s.edited(good, func(m *ocispec.Manifest) { m.Layers[0].Annotations[pilot] += "," + older[pilot] })
	out, err := Rewrap(s.ctx, s, target, Rewrapping{Keys: kekOnly, Add: kek("pilot", "c").Parameters}, Options{})
	if err != nil || s.recipients(out.Target) != "pilot:a@1, pilot:b@1, pilot:c@1" {
		t.Fatalf("%s, %v", s.recipients(out.Target), err)
	}
	// Nobody knows whose seal is right, so it is wrapped for nobody else.
	l := s.layers(out.Target)[0]
	last := values("provider.pilot", l.Annotations[pilot])[2].keys[0]
	added, err := unwrapFrom(s.ctx, &last, kekOnly, l)
	if err != nil {
		t.Fatal(err)
	}
	defer added.Clear()
	if last.KEK != "c" || added.Sealed != nil || !added.Equal(key.WithSealed(nil)) {
		t.Errorf("%s: sealed %q", last.KEK, added.Sealed)
	}
}
