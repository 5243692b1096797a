package keyprovider

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// TestSeveralKEKs wraps for three KEKs and unwraps where there is only one.
func TestSeveralKEKs(t *testing.T) {
	keks := map[string][]byte{}
	for _, id := range []string{"a", "b", "c"} {
		keks[id] = bytes.Repeat([]byte(id), 32)
	}
	annotation := wrapFor(t, newProvider(t, startBroker(t, keks).url, Config{}), "a", "b", "c", "a")
	var list []wireformat.Annotation
	if err := json.Unmarshal(annotation, &list); err != nil || len(list) != 3 {
		t.Fatalf("annotation %s is no array of three: %v", annotation, err)
	}
	for id, key := range keks {
		alone := startBroker(t, map[string][]byte{id: key})
		if err := unwraps(t, newProvider(t, alone.url, Config{}), annotation); err != nil {
			t.Errorf("with %s alone: %v", id, err)
		}
	}
	foreign := startBroker(t, map[string][]byte{"b": nil, "d": nil})
	err := unwraps(t, newProvider(t, foreign.url, Config{}), annotation)
	if !errors.Is(err, client.ErrNotFound) || !errors.Is(err, ErrWrongKEK) {
		t.Errorf("with none of them: %v", err)
	}
	for _, id := range []string{"a", "b", "c"} {
		if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("KEK %q", id)) {
			t.Errorf("the error does not say what is wrong with %s: %v", id, err)
		}
	}
}

// TestOneKEK checks that a single one is no array, which the original could
// not read.
func TestOneKEK(t *testing.T) {
	fipstest.Refused(t, fipstest.Original)
	b := startBroker(t, map[string][]byte{"a": nil})
	for _, format := range []Format{FormatA256GCMKW, FormatOriginal} {
		annotation := wrapFor(t, newProvider(t, b.url, Config{Format: format}), "a")
		if err := json.Unmarshal(annotation, new(wireformat.Annotation)); err != nil {
			t.Errorf("%s: %s: %v", format, annotation, err)
		}
	}
	p := newProvider(t, b.url, Config{Format: FormatOriginal})
	if _, err := p.WrapKey(t.Context(), named("a", "b"), []byte(secret)); !errors.Is(err, ErrInput) {
		t.Errorf("two KEKs in the original's format: %v", err)
	}
}

// TestParameters checks that only KEKs are used that the caller names.
func TestParameters(t *testing.T) {
	fipstest.Refused(t, fipstest.Original)
	b := startBroker(t, map[string][]byte{"a": nil, "b": nil, "c": nil})
	several := wrapFor(t, newProvider(t, b.url, Config{}), "a", "b")
	original := wrapFor(t, newProvider(t, b.url, Config{Format: FormatOriginal}), "a")
	for _, test := range []struct {
		name       string
		annotation []byte
		params     []string
		is         error
		used       []string // KEKs that the broker is asked for
	}{
		{"none", several, nil, nil, []string{"a"}},
		{"no parameter", several, []string{"Enabled"}, nil, []string{"a"}},
		{"the first", several, []string{"a"}, nil, []string{"a"}},
		{"the second", several, []string{"b"}, nil, []string{"b"}},
		{"another and the second", several, []string{"c", "b"}, nil, []string{"b"}},
		{"another", several, []string{"c"}, ErrWrongKEK, nil},
		{"what can't be", several, []string{"a", "b c"}, ErrInput, nil},
		{"original, none", original, nil, nil, []string{"c", "a"}},
		{"original, the KEK", original, []string{"a"}, nil, []string{"a"}},
		{"original, another", original, []string{"b"}, ErrWrongKEK, []string{"b"}},
		{"original, two", original, []string{"b", "a"}, nil, []string{"b", "a"}},
	} {
		before := map[string]int{}
		for _, id := range []string{"a", "b", "c"} {
			before[id] = b.asked(t, id)
		}
		p := newProvider(t, b.url, Config{DefaultKEKs: []string{"c", "a"}})
		if err := unwraps(t, p, test.annotation, test.params...); !errors.Is(err, test.is) {
			t.Errorf("%s: %v, want %v", test.name, err, test.is)
		}
		for id, n := range before {
			if used := b.asked(t, id) > n; used != slices.Contains(test.used, id) {
				t.Errorf("%s: KEK %s used: %t", test.name, id, used)
			}
		}
	}
	if err := unwraps(t, newProvider(t, b.url, Config{}), original); !errors.Is(err, ErrInput) || !strings.Contains(err.Error(), "default-keks") {
		t.Errorf("an original annotation and no KEK to try: %v", err)
	}
}

// TestRotatedSince unwraps, with a KEK in the cache, what was wrapped with a
// version that came after it.
func TestRotatedSince(t *testing.T) {
	fipstest.Refused(t, fipstest.Original)
	b := startBroker(t, map[string][]byte{"a": nil})
	for name, url := range map[string]string{"copilot": b.url, "original broker": b.tcp + "/api/v1/key"} {
		conf := Config{Format: FormatOriginal, DefaultKEKs: []string{"a"}, CacheSize: 10}
		p := newProvider(t, url, conf)
		now := time.Now()
		p.keks.now = func() time.Time { return now }
		if err := unwraps(t, p, wrapFor(t, newProvider(t, url, conf), "a")); err != nil {
			t.Fatal(err)
		}
		b.rotate(t, "a", 1)
		since := wrapFor(t, newProvider(t, url, conf), "a")
		now = now.Add(errorTTL)
		if err := unwraps(t, p, since); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestOriginalAcrossRotations unwraps what does not say which version it takes.
func TestOriginalAcrossRotations(t *testing.T) {
	fipstest.Refused(t, fipstest.Original)
	b := startBroker(t, map[string][]byte{"a": nil, "b": bytes.Repeat([]byte("b"), 16)})
	conf := Config{Format: FormatOriginal, DefaultKEKs: []string{"a", "b"}, CacheSize: 10}
	annotations := map[string][]byte{}
	for _, id := range []string{"a", "b"} {
		annotations[id+" version 1"] = wrapFor(t, newProvider(t, b.url, conf), id)
		b.rotate(t, id, 1)
		annotations[id+" version 2"] = wrapFor(t, newProvider(t, b.url, conf), id)
		b.rotate(t, id, 2)
	}
	p := newProvider(t, b.url, conf)
	for name, annotation := range annotations {
		id, _, _ := strings.Cut(name, " ")
		if err := unwraps(t, p, annotation); err != nil {
			t.Errorf("%s, with the default KEKs: %v", name, err)
		}
		if err := unwraps(t, p, annotation, id); err != nil {
			t.Errorf("%s, named: %v", name, err)
		}
	}
	// The current version and 15 older ones are tried, and no more.
	b.rotate(t, "a", 16-4)
	if err := unwraps(t, newProvider(t, b.url, conf), annotations["a version 1"], "a"); err != nil {
		t.Errorf("16 versions: %v", err)
	}
	b.rotate(t, "a", 1)
	if err := unwraps(t, newProvider(t, b.url, conf), annotations["a version 1"], "a"); !errors.Is(err, ErrWrongKEK) {
		t.Errorf("17 versions: %v", err)
	}
}

// TestUnwrapWithoutVersion unwraps what was wrapped when the broker was asked
// by the original's API, which has no versions.
func TestUnwrapWithoutVersion(t *testing.T) {
	b := startBroker(t, map[string][]byte{"a": nil})
	annotation := wrapFor(t, newProvider(t, b.tcp+"/api/v1/key", Config{}), "a")
	if strings.Contains(string(annotation), "kekVersion") || !strings.Contains(string(annotation), `"A256GCMKW"`) {
		t.Fatalf("annotation %s", annotation)
	}
	if err := unwraps(t, newProvider(t, b.tcp+"/api/v1/key", Config{}), annotation); err != nil {
		t.Errorf("by the original's API: %v", err)
	}
	for versions := 1; versions <= 3; versions++ {
		if err := unwraps(t, newProvider(t, b.url, Config{}), annotation); err != nil {
			t.Errorf("with %d versions: %v", versions, err)
		}
		b.rotate(t, "a", 1)
	}
	if err := unwraps(t, newProvider(t, b.tcp+"/api/v1/key", Config{}), annotation); !errors.Is(err, ErrWrongKEK) {
		t.Errorf("by the original's API, which has the current version only: %v", err)
	}
}

func TestMostKEKs(t *testing.T) {
	b := startBroker(t, map[string][]byte{"a": nil})
	p := newProvider(t, b.url, Config{})
	annotation := wrapFor(t, p, "a")
	most := slices.Repeat([]string{"a"}, 64)
	if err := unwraps(t, p, wrapFor(t, p, most...), most...); err != nil {
		t.Errorf("64 KEKs: %v", err)
	}
	for i := range 65 {
		most = append(most[:i], fmt.Sprintf("kek-%d", i))
	}
	_, err := p.WrapKey(t.Context(), named(most...), []byte(secret))
	for name, err := range map[string]error{"wrap": err, "unwrap": unwraps(t, p, annotation, most...)} {
		if !errors.Is(err, ErrInput) || !strings.Contains(err.Error(), "65 KEKs are named, at most 64 can be") {
			t.Errorf("%s with 65 KEKs: %v", name, err)
		}
	}
	if n := b.asked(t, "kek-0"); n != 0 {
		t.Errorf("the broker was asked for one of them %d times", n)
	}
}

// TestCacheOfOne checks that a cache for one KEK serves all of an image's
// layers, which are unwrapped by the version of the current one that they were
// wrapped with. Only wrapping asks the broker again which one is current.
func TestCacheOfOne(t *testing.T) {
	b := startBroker(t, map[string][]byte{"a": nil})
	p := newProvider(t, b.url, Config{CacheSize: 1})
	for want := range 2 {
		annotation := wrapFor(t, p, "a")
		for range 3 {
			if err := unwraps(t, p, annotation); err != nil {
				t.Error(err)
			}
		}
		if n := b.asked(t, "a"); n != want+1 {
			t.Errorf("the KEK was fetched %d times, want %d", n, want+1)
		}
	}
}

// TestWrapAfterRotation wraps with the new version at once, however long a KEK
// stays in memory.
func TestWrapAfterRotation(t *testing.T) {
	b := startBroker(t, map[string][]byte{"a": nil})
	p := newProvider(t, b.url, Config{CacheSize: 10})
	for want := 1; want <= 3; want++ {
		list, err := wireformat.ParseAnnotation(wrapFor(t, p, "a"))
		if err != nil || list[0].KEKVersion != want {
			t.Errorf("wrapped with %+v, %v, want version %d", list, err, want)
		}
		b.rotate(t, "a", 1)
	}
}
