package server

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestAuditLogSaysWhichVersionsAreGone destroys a version of a KEK, and then the others.
func TestAuditLogSaysWhichVersionsAreGone(t *testing.T) {
	conf := Config{Dir: t.TempDir()}
	b, keys := localBroker(t, conf)
	if _, err := keys.Create(t.Context(), "team-a", nil); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := keys.Rotate(t.Context(), "team-a"); err != nil {
			t.Fatal(err)
		}
	}
	gone := func(version int, want string) {
		t.Helper()
		if _, err := keys.Destroy(t.Context(), "team-a", version, time.Second); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
			if _, err := b.keks.Store.CheckChanged(t.Context(), 0); err != nil {
				t.Fatal(err)
			}
			b.sweep(t.Context())
			log, err := os.ReadFile(filepath.Join(conf.Dir, "audit.log"))
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(log), want) {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("the audit log lacks %s:\n%s", want, log)
			}
		}
	}
	gone(1, `"action":"destroyed","kek":"team-a","version":1,`)
	gone(0, `"reason":"the waiting time is over for the versions 2-4"`)
}

func TestSpans(t *testing.T) {
	for want, numbers := range map[string][]int{"": nil, "3": {3}, "1-2": {1, 2}, "1-3, 7": {1, 2, 3, 7}, "1, 3, 5-6": {1, 3, 5, 6}} {
		if got := spans(numbers); got != want {
			t.Errorf("%v: %q", numbers, got)
		}
	}
}

// localBroker returns a broker that nobody serves, until the test ends, with its KEKs.
func localBroker(t testing.TB, conf Config) (*broker, *localKeys) {
	t.Helper()
	if err := conf.check(); err != nil {
		t.Fatal(err)
	}
	b, err := newBroker(context.Background(), conf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.close() })
	return b, newLocalKeys(b, conf)
}
