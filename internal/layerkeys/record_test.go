package layerkeys

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/ctrlplane/pilot/internal/openedby"
)

var (
	diffID       = digest.FromString("diff ID")
	blob, blob2  = digest.FromString("blob"), digest.FromString("blob 2")
	teamA, teamB = openedby.Opener{Scheme: "provider.pilot", KEK: "team-a", Version: 1}, openedby.Opener{Scheme: "provider.pilot", KEK: "team-b", Version: 2}
)

func open(t testing.TB, path string) *Record {
	t.Helper()
	r, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func (r *Record) mustAdd(t testing.TB, d digest.Digest, b Blob) {
	t.Helper()
	if err := r.Add(d, b); err != nil {
		t.Fatal(err)
	}
}

// decrypted returns what is known of a blob that was decrypted.
func (l Layer) decrypted(d digest.Digest) (Blob, bool) {
	i := slices.IndexFunc(l.Blobs, func(b Blob) bool { return b.Digest == d && b.Basis == Decrypted })
	if i < 0 {
		return Blob{}, false
	}
	return l.Blobs[i], true
}

// text returns what is known of a layer.
func text(r *Record, d digest.Digest) string {
	l, ok := r.Layer(d)
	if !ok {
		return "nothing"
	}
	var all []string
	for _, b := range l.Blobs {
		all = append(all, fmt.Sprint(map[digest.Digest]string{blob: "1", blob2: "2"}[b.Digest], " ", b.Basis, " ", b.KEKs, " ", b.Other))
	}
	return strings.Join(all, "; ")
}

func TestWhatIsKnownBetterCounts(t *testing.T) {
	one, two := []byte("fingerprint 1"), []byte("fingerprint 2")
	claim := func(d digest.Digest, by openedby.Opener) Blob { return Opened(d, Claimed, by, nil) }
	for name, test := range map[string]struct {
		blobs []Blob
		want  string
	}{
		"claims of several manifests stay apart": {[]Blob{claim(blob, teamA), claim(blob, teamB), claim(blob, teamA)}, "1 claimed [{team-a 1}] false; 1 claimed [{team-b 2}] false"},
		"seals of other keys stay apart":         {[]Blob{Opened(blob, Sealed, teamA, one), Opened(blob, Sealed, teamB, two)}, "1 sealed [{team-a 1}] false; 1 sealed [{team-b 2}] false"},
		"seals of the same key are one":          {[]Blob{Opened(blob, Sealed, teamA, one), Opened(blob, Sealed, teamB, one)}, "1 sealed [{team-a 1} {team-b 2}] false"},
		"decrypted, claims of the blob are gone": {[]Blob{claim(blob, teamA), claim(blob, teamB), claim(blob2, teamB), Opened(blob, Decrypted, teamA, one)}, "2 claimed [{team-b 2}] false; 1 decrypted [{team-a 1}] false"},
		"claims after that do not count":         {[]Blob{Opened(blob, Decrypted, teamA, one), claim(blob, teamB)}, "1 decrypted [{team-a 1}] false"},
		"nor does a seal with another key":       {[]Blob{Opened(blob, Decrypted, teamA, one), Opened(blob, Sealed, teamB, two)}, "1 decrypted [{team-a 1}] false"},
		"another recipient of the key is added":  {[]Blob{Opened(blob, Decrypted, teamA, one), Opened(blob, Sealed, teamB, one)}, "1 decrypted [{team-a 1} {team-b 2}] false"},
		"a sealed layer is decrypted":            {[]Blob{Opened(blob, Sealed, teamB, one), Opened(blob, Decrypted, teamA, one)}, "1 decrypted [{team-b 2} {team-a 1}] false"},
		"a falsely sealed one is another's":      {[]Blob{Opened(blob, Sealed, teamB, two), Opened(blob, Decrypted, teamA, one)}, "1 decrypted [{team-a 1}] false"},
		"several blobs":                          {[]Blob{Opened(blob, Decrypted, teamA, one), Opened(blob2, Decrypted, teamB, two)}, "1 decrypted [{team-a 1}] false; 2 decrypted [{team-b 2}] false"},
		"a private key":                          {[]Blob{Opened(blob, Decrypted, openedby.Opener{Scheme: "jwe"}, one), Opened(blob, Decrypted, teamA, one)}, "1 decrypted [{team-a 1}] true"},
	} {
		r := open(t, filepath.Join(t.TempDir(), "layers"))
		for _, b := range test.blobs {
			r.mustAdd(t, diffID, b)
		}
		if got := text(r, diffID); got != test.want {
			t.Errorf("%s: got %s, want %s", name, got, test.want)
		}
	}
}

func TestKEKIsPublicIfNothingElseWasWrappedWithIt(t *testing.T) {
	public := openedby.Opener{KEK: "team-a", Version: 1, Public: true}
	for name, test := range map[string]struct {
		openers []openedby.Opener
		want    int
	}{"public": {[]openedby.Opener{public, public}, 1}, "both": {[]openedby.Opener{public, teamA}, 0}, "the other way around": {[]openedby.Opener{teamA, public}, 0}} {
		r := open(t, filepath.Join(t.TempDir(), "layers"))
		for _, o := range test.openers {
			r.mustAdd(t, diffID, Opened(blob, Decrypted, o, []byte("f")))
		}
		l, _ := r.Layer(diffID)
		if b, _ := l.decrypted(blob); len(b.Public) != test.want || len(b.KEKs) != 1 {
			t.Errorf("%s: %+v", name, b)
		}
	}
}

// TestChainIDIsNoDiffID: only the content of a layer shows what is a diff ID.
func TestChainIDIsNoDiffID(t *testing.T) {
	r := open(t, filepath.Join(t.TempDir(), "layers"))
	chain, plain := digest.FromString("a chain ID"), digest.FromString("of a plain layer")
	r.mustAdd(t, chain, Opened(blob, Claimed, teamA, nil))
	r.mustAdd(t, chain, Opened(blob, Sealed, teamA, []byte("f")))
	r.mustAdd(t, diffID, Opened(blob, Decrypted, teamA, []byte("f")))
	r.AddPlain(blob2, plain)
	if r.IsDiffID(chain) || !r.IsDiffID(diffID) || !r.IsDiffID(plain) || r.IsDiffID(blob) {
		t.Error("a chain ID is taken for a diff ID, or the other way around")
	}
}

func TestRecordIsTheSameAfterARestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state", "layers")
	r := open(t, path)
	b := Opened(blob, Decrypted, openedby.Opener{KEK: "team-a", Version: 3, Public: true}, []byte("f"))
	b.Size = 5
	r.mustAdd(t, diffID, b)
	r.AddPlain(blob2, diffID)
	if err := r.Begin(func(add func(digest.Digest, Blob)) { add(blob, Opened(blob2, Claimed, teamB, nil)) }); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	r = open(t, path)
	l, _ := r.Layer(diffID)
	if got, ok := l.decrypted(blob); !ok || !got.equal(b) || !r.Begun() || !r.IsPlain(blob2, diffID) || r.IsPlain(blob2, blob) || text(r, blob) != "2 claimed [{team-b 2}] false" {
		t.Errorf("%+v, begun %v, %s", l, r.Begun(), text(r, blob))
	}
}

// TestEveryTruncationIsFound cuts the file at each byte, and changes each.
func TestEveryTruncationIsFound(t *testing.T) {
	path := filepath.Join(t.TempDir(), "layers")
	r := open(t, path)
	r.mustAdd(t, diffID, Opened(blob, Decrypted, teamA, []byte("f")))
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parse(whole); err != nil {
		t.Fatal(err)
	}
	for i := range whole {
		if _, err := parse(whole[:i]); err == nil {
			t.Errorf("cut to %d bytes, nothing is found", i)
		}
		changed := append([]byte{}, whole...)
		changed[i] ^= 1
		if f, err := parse(changed); err == nil {
			t.Errorf("byte %d changed, nothing is found: %+v", i, f)
		}
	}
}

func TestRecordThatCantBeSavedFails(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "layers")
	r := open(t, path)
	r.mustAdd(t, diffID, Opened(blob, Decrypted, teamA, nil))
	if err := os.Mkdir(path+".new", 0o700); err != nil { // root may write everywhere
		t.Fatal(err)
	}
	for range 2 {
		if err := r.Add(blob, Opened(blob2, Decrypted, teamB, nil)); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("it is not saved, and Add returns %v", err)
		}
	}
	if err := os.Remove(path + ".new"); err != nil {
		t.Fatal(err)
	}
	if err := r.Save(); err != nil {
		t.Fatal(err)
	}
	r.Close()
	if got := text(open(t, path), blob); got != "2 decrypted [{team-b 2}] false" {
		t.Errorf("after a restart: %s", got)
	}
}

func TestSaveRestoresAFileThatWasRemovedOrReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "layers")
	r := open(t, path)
	r.mustAdd(t, diffID, Opened(blob, Decrypted, teamA, nil))
	for name, change := range map[string]func() error{
		"removed":  func() error { return os.Remove(path) },
		"replaced": func() error { return errors.Join(os.Remove(path), os.WriteFile(path, []byte("{}"), 0o600)) },
	} {
		if err := errors.Join(change(), r.Save()); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if f, err := parse(b); err != nil || len(f.Layers) != 1 {
			t.Errorf("%s: %+v, %v", name, f, err)
		}
	}
}

// TestPlainLayersNeedNoRecord has a disk that can't be written from the beginning.
func TestPlainLayersNeedNoRecord(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := open(t, filepath.Join(file, "layers"))
	r.AddPlain(blob, diffID)
	if !r.IsPlain(blob, diffID) {
		t.Error("a plain layer is not known")
	}
	if err := r.Add(diffID, Opened(blob2, Decrypted, teamA, nil)); err == nil {
		t.Error("an encrypted layer is recorded in no file")
	}
	path := filepath.Join(t.TempDir(), "layers")
	open(t, path)
	if _, err := Open(path); !errors.Is(err, errInUse) {
		t.Errorf("a record that is in use: %v", err)
	}
}

// TestRecordThatWasUninstalledStaysAway stops pilot after "pilot node uninstall".
func TestRecordThatWasUninstalledStaysAway(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state", "layers")
	r := open(t, path)
	r.mustAdd(t, diffID, Opened(blob, Decrypted, teamA, nil))
	if err := os.RemoveAll(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	r.AddPlain(blob2, blob)
	if err := errors.Join(r.Save(), r.Flush()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Dir(path)); err == nil {
		t.Error("it is back")
	}
	r.mustAdd(t, blob, Opened(blob, Decrypted, teamA, nil)) // pilot is used, so it is needed
	if got, err := Inspect(path); err != nil || got != 2 {
		t.Errorf("%d layers, %v", got, err)
	}
}

func TestForgetKeepsWhatIsLiveOrNew(t *testing.T) {
	r := open(t, filepath.Join(t.TempDir(), "layers"))
	now := time.Now()
	r.now = func() time.Time { return now }
	live, gone, plainGone := digest.FromString("live"), digest.FromString("gone"), digest.FromString("plain")
	r.mustAdd(t, live, Opened(blob, Decrypted, teamA, nil))
	r.mustAdd(t, gone, Opened(blob, Decrypted, teamA, nil))
	r.AddPlain(blob, plainGone)
	now = now.Add(time.Hour)
	r.mustAdd(t, diffID, Opened(blob, Decrypted, teamA, nil))
	n, err := r.Forget(now, func(d digest.Digest) bool { return d == live })
	if n != 2 || err != nil || text(r, live) == "nothing" || text(r, gone) != "nothing" || text(r, diffID) == "nothing" || r.IsPlain(blob, plainGone) {
		t.Errorf("%d, %v: live %s, gone %s, new %s", n, err, text(r, live), text(r, gone), text(r, diffID))
	}
}

// TestGrowthIsBounded has one who knows a layer, and encrypts it again and again.
func TestGrowthIsBounded(t *testing.T) {
	r := open(t, filepath.Join(t.TempDir(), "layers"))
	r.mustAdd(t, diffID, Opened(blob, Decrypted, teamA, []byte("a")))
	r.mu.Lock()
	for i := range 3 * maxBlobs {
		name := fmt.Sprint(i)
		r.add(diffID, Opened(digest.FromString(name), Decrypted, teamB, []byte(name)))
	}
	for i := range 3 * maxKEKs {
		r.add(blob, Opened(blob, Decrypted, openedby.Opener{KEK: fmt.Sprint(i)}, []byte("a")))
	}
	r.mu.Unlock()
	l, _ := r.Layer(diffID)
	if _, ok := l.decrypted(blob); !ok || len(l.Blobs) != maxBlobs {
		t.Errorf("%d blobs, and the first KEK's is there: %t", len(l.Blobs), ok)
	}
	if l, _ = r.Layer(blob); len(l.Blobs) != 1 || len(l.Blobs[0].KEKs) != maxKEKs {
		t.Errorf("%d KEKs", len(l.Blobs[0].KEKs))
	}
}

func TestConcurrentAdds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "layers")
	r := open(t, path)
	var wg sync.WaitGroup
	const n = 50
	for i := range n {
		wg.Go(func() {
			d := digest.FromString(fmt.Sprint(i))
			if err := r.Add(d, Opened(blob, Decrypted, teamA, nil)); err != nil {
				t.Error(err)
			}
			b, err := os.ReadFile(path)
			if f, parseErr := parse(b); err != nil || parseErr != nil || len(f.Layers[d].Blobs) != 1 {
				t.Errorf("it was added, and is not in the file: %v, %v", err, parseErr)
			}
		})
	}
	wg.Wait()
}

// BenchmarkAdd adds layers to the record of a node with 2000.
func BenchmarkAdd(b *testing.B) {
	r := open(b, filepath.Join(b.TempDir(), "layers"))
	r.mu.Lock()
	for i := range 2000 {
		r.add(digest.FromString(fmt.Sprint(i)), Opened(blob, Decrypted, teamA, make([]byte, 32)))
	}
	r.mu.Unlock()
	i := 0
	for b.Loop() {
		i++
		r.mustAdd(b, digest.FromString(fmt.Sprint("new", i%1000)), Opened(digest.FromString(fmt.Sprint(i)), Decrypted, teamA, make([]byte, 32)))
	}
}

// TestVouchedIsWhatWasWrappedForTheContent merges what openers have said of one blob.
func TestVouchedIsWhatWasWrappedForTheContent(t *testing.T) {
	content, other := digest.FromString("plain"), digest.FromString("another plain")
	a, b, public := teamA, teamB, teamA
	a.Digest, b.Digest, public.Digest, public.Public = other, content, content, true
	good := teamA
	good.Digest = content
	uncompressed := teamA
	uncompressed.Digest = diffID
	for name, test := range map[string]struct {
		openers []openedby.Opener
		want    []KEK
	}{
		"its content":                {[]openedby.Opener{good}, []KEK{{"team-a", 1}}},
		"uncompressed":               {[]openedby.Opener{uncompressed}, []KEK{{"team-a", 1}}},
		"no digest":                  {[]openedby.Opener{teamA}, nil},
		"another's key":              {[]openedby.Opener{a}, nil},
		"with a recipient of theirs": {[]openedby.Opener{b, a}, []KEK{{"team-b", 2}}},
		"the other way around":       {[]openedby.Opener{a, b}, []KEK{{"team-b", 2}}},
		"by a public key":            {[]openedby.Opener{public, a}, nil},
		"by a public key, too":       {[]openedby.Opener{public, good, public}, []KEK{{"team-a", 1}}},
		"known only later":           {[]openedby.Opener{teamA, good}, []KEK{{"team-a", 1}}},
	} {
		path := filepath.Join(t.TempDir(), "layers")
		r := open(t, path)
		for _, o := range test.openers {
			known := Opened(blob, Decrypted, o.Vouching(content, diffID), []byte("f"))
			known.Plain = content
			r.mustAdd(t, diffID, known)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		l, _ := open(t, path).Layer(diffID)
		if got, _ := l.decrypted(blob); !slices.Equal(got.Vouched, test.want) || got.Plain != content {
			t.Errorf("%s: %+v, want %v", name, got, test.want)
		}
	}
}

// TestWithdrawnSealIsOneKeys: that one key's seal of a blob is false says nothing about others.
func TestWithdrawnSealIsOneKeys(t *testing.T) {
	r := open(t, filepath.Join(t.TempDir(), "layers"))
	r.mustAdd(t, diffID, Opened(blob, Claimed, teamA, nil))
	r.mustAdd(t, diffID, Opened(blob, Sealed, teamA, []byte("1")))
	r.mustAdd(t, diffID, Opened(blob, Sealed, teamB, []byte("2")))
	if err := r.Withdraw(diffID, blob, []byte("2")); err != nil {
		t.Fatal(err)
	}
	if got, want := text(r, diffID), "1 claimed [{team-a 1}] false; 1 sealed [{team-a 1}] false"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}
