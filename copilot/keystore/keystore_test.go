package keystore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func openStore(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(t.Context(), dir, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// key returns the key of a version of a KEK.
// sweep is [Store.Sweep] after a check, as copilot does it.
func sweep(s *Store, log func(KEK, []int) error) error {
	if _, err := s.CheckChanged(context.Background(), 0); err != nil {
		return err
	}
	return s.Sweep(context.Background(), log)
}

func key(s *Store, id string, version int) ([]byte, int, error) {
	k, err := s.Get(context.Background(), id)
	if err != nil {
		return nil, 0, err
	}
	return s.Key(k, version)
}

func TestStore(t *testing.T) {
	dir, ctx := t.TempDir(), t.Context()
	s := openStore(t, dir)
	for _, id := range []string{"", ".", "..", "/a", "a//b", "a/../b", "a b", "é", "-a", strings.Repeat("a", 129)} {
		if _, err := s.Create(ctx, id, nil, Change{}); !errors.Is(err, ErrInput) {
			t.Errorf("create %q: %v", id, err)
		}
		if _, err := s.Get(ctx, id); !errors.Is(err, ErrNotFound) {
			t.Errorf("get %q: %v", id, err)
		}
	}
	for _, size := range []int{0, 1, 15, 31, 33, 64} {
		if _, err := s.Create(ctx, "sized", make([]byte, size), Change{}); !errors.Is(err, ErrInput) {
			t.Errorf("import %d bytes: %v", size, err)
		}
	}
	if _, err := s.Create(ctx, "a", nil, Change{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(ctx, "a", nil, Change{}); !errors.Is(err, ErrExists) {
		t.Errorf("create again: %v", err)
	}
	for name, do := range map[string]func() (KEK, error){
		"rotate":  func() (KEK, error) { return s.Rotate(ctx, "b", 0, Change{}) },
		"disable": func() (KEK, error) { return s.Disable(ctx, "b", 0, Change{}) },
		"enable":  func() (KEK, error) { return s.Enable(ctx, "b", 1, Change{}) },
		"destroy": func() (KEK, error) { return s.Destroy(ctx, "b", 0, time.Now(), Change{}) },
		"revoke":  func() (KEK, error) { return s.Revoke(ctx, "b", "uid:0", Change{}) },
	} {
		if _, err := do(); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s what is not there: %v", name, err)
		}
	}
	first, _, err := key(s, "a", 0)
	if err != nil || len(first) != KeySize {
		t.Fatalf("%d bytes, %v", len(first), err)
	}
	s.Close()
	db, err := os.ReadFile(filepath.Join(dir, "keks.db"))
	if err != nil || bytes.Contains(db, first) {
		t.Errorf("the key is in the file as it is (%v)", err)
	}
	if s = openStore(t, dir); err != nil {
		t.Fatal(err)
	}
	if again, _, err := key(s, "a", 1); err != nil || !bytes.Equal(again, first) {
		t.Errorf("another key after opening again: %v", err)
	}
}

// TestTampered changes what is in the file.
func TestTampered(t *testing.T) {
	for name, change := range map[string][2]string{
		"the sealed key":             {`"sealed":"`, `"sealed":"AA`},
		"who is revoked":             {`"uid:7"`, `"uid:8"`},
		"that it is disabled":        {`"disabled":true`, `"disabled":null`},
		"which version is current":   {`"version":2`, `"version":1`},
		"what the record belongs to": {"one", "two"},
	} {
		t.Run(name, func(t *testing.T) {
			dir, ctx := t.TempDir(), t.Context()
			s := openStore(t, dir)
			s.Create(ctx, "one", nil, Change{})
			s.Rotate(ctx, "one", 0, Change{})
			s.Revoke(ctx, "one", "uid:7", Change{})
			if _, err := s.Disable(ctx, "one", 0, Change{}); err != nil {
				t.Fatal(err)
			}
			s.Close()
			file := filepath.Join(dir, "keks.db")
			db, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			from, to := []byte(change[0]), []byte(change[1])
			if !bytes.Contains(db, from) {
				t.Fatalf("%s is not in the file", from)
			}
			for rest := db; ; {
				i := bytes.Index(rest, from)
				if i < 0 {
					break
				}
				copy(rest[i:], to)
				rest = rest[i+len(from):]
			}
			if err := os.WriteFile(file, db, 0o600); err != nil {
				t.Fatal(err)
			}
			s = openStore(t, dir)
			for _, id := range []string{"one", "two"} {
				if k, err := s.Get(ctx, id); err == nil || !strings.Contains(err.Error(), "damaged or was tampered with") && !errors.Is(err, ErrNotFound) {
					t.Errorf("%s: %+v, %v", id, k, err)
				}
			}
			if _, err := s.Rotate(ctx, "one", 0, Change{}); err == nil {
				t.Error("it was changed further")
			}
		})
	}
}

func TestMasterKey(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir)
	s.Create(t.Context(), "a", nil, Change{})
	s.Close()
	master := filepath.Join(dir, "master.key")
	good, err := os.ReadFile(master)
	if err != nil {
		t.Fatal(err)
	}
	refused := func(want string) {
		t.Helper()
		if s, err := Open(t.Context(), dir, ""); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
			if s != nil {
				s.Close()
			}
		}
	}
	os.Rename(master, master+".away")
	refused("the master key is missing")
	os.WriteFile(master, bytes.Repeat([]byte{1}, 32), 0o600)
	refused("not the one that the KEKs are sealed with")
	os.WriteFile(master, good[:31], 0o600)
	refused("31 bytes")
	os.WriteFile(master, good, 0o600)
	os.Chmod(master, 0o644)
	refused("can be read by others")
	os.Remove(master)
	credentials := t.TempDir()
	os.WriteFile(filepath.Join(credentials, "copilot-master-key"), good, 0o440)
	t.Setenv("CREDENTIALS_DIRECTORY", credentials)
	if s, err = Open(t.Context(), dir, ""); err != nil {
		t.Fatalf("with systemd's credential: %v", err)
	}
	s.Close()
	other := t.TempDir()
	if s, err = Open(t.Context(), other, ""); err != nil {
		t.Fatal(err)
	}
	s.Close()
	a, errA := AuditKey(dir)
	b, errB := AuditKey(other)
	if errA != nil || errB != nil || !bytes.Equal(a, b) || bytes.Equal(a, good) {
		t.Errorf("audit keys: %v, %v", errA, errB)
	}
	if _, err := os.Stat(filepath.Join(other, "master.key")); err == nil {
		t.Error("a second master key was made")
	}
}

// TestLife takes a KEK through all its states.
func TestLife(t *testing.T) {
	ctx := t.Context()
	s := openStore(t, t.TempDir())
	now := time.Now()
	s.now = func() time.Time { return now }
	usable := func(want ...int) {
		t.Helper()
		for version := range 4 {
			_, _, err := key(s, "a", version)
			wanted := false
			for _, w := range want {
				wanted = wanted || w == version
			}
			if (err == nil) != wanted {
				t.Errorf("version %d: %v", version, err)
			}
			if err != nil && !errors.Is(err, ErrDisabled) && !errors.Is(err, ErrNotFound) {
				t.Errorf("version %d: %v", version, err)
			}
		}
	}
	did := func(_ KEK, err error) {
		t.Helper()
		if err != nil {
			t.Error(err)
		}
	}
	did(s.Create(ctx, "a", nil, Change{}))
	did(s.Rotate(ctx, "a", 0, Change{}))
	did(s.Rotate(ctx, "a", 2, Change{}))
	if _, err := s.Rotate(ctx, "a", 2, Change{}); !errors.Is(err, ErrState) {
		t.Errorf("rotate what was rotated: %v", err)
	}
	usable(0, 1, 2, 3)
	did(s.Disable(ctx, "a", 2, Change{}))
	usable(0, 1, 3)
	did(s.Disable(ctx, "a", 0, Change{}))
	usable()
	did(s.Enable(ctx, "a", 0, Change{}))
	usable(0, 1, 3) // version 2 was disabled by itself
	did(s.Enable(ctx, "a", 2, Change{}))
	usable(0, 1, 2, 3)
	did(s.Disable(ctx, "a", 3, Change{}))
	usable(1, 2) // the current one is disabled, so nothing can be wrapped
	did(s.Enable(ctx, "a", 3, Change{}))

	did(s.Destroy(ctx, "a", 1, now.Add(time.Hour), Change{}))
	usable(0, 2, 3)
	now = now.Add(59 * time.Minute)
	did(s.Enable(ctx, "a", 1, Change{}))
	usable(0, 1, 2, 3)
	did(s.Destroy(ctx, "a", 1, now.Add(time.Hour), Change{}))
	if _, err := s.Disable(ctx, "a", 1, Change{}); !errors.Is(err, ErrState) {
		t.Errorf("disable what is to be destroyed: %v", err)
	}
	now = now.Add(time.Hour + time.Second)
	usable(0, 2, 3)
	if _, err := s.Enable(ctx, "a", 1, Change{}); !errors.Is(err, ErrState) {
		t.Errorf("enable what was destroyed: %v", err)
	}
	var swept []string
	if err := sweep(s, func(k KEK, versions []int) error { swept = append(swept, fmt.Sprint(k.ID, versions)); return nil }); err != nil || len(swept) != 1 || swept[0] != "a[1]" {
		t.Errorf("swept %v, %v", swept, err)
	}
	if err := sweep(s, func(KEK, []int) error { t.Error("swept again"); return nil }); err != nil {
		t.Error(err)
	}
	k, err := s.Get(ctx, "a")
	if err != nil || k.Versions[0].Sealed != nil || k.Versions[0].State != Destroyed || k.Versions[1].Sealed == nil {
		t.Errorf("after the sweep: %+v, %v", k.Versions, err)
	}
	did(s.Destroy(ctx, "a", 0, now, Change{}))
	usable()
	if _, err := s.Create(ctx, "a", nil, Change{}); !errors.Is(err, ErrExists) {
		t.Errorf("create what was destroyed: %v", err)
	}
	if _, err := s.Rotate(ctx, "a", 0, Change{}); !errors.Is(err, ErrNotFound) {
		t.Errorf("rotate what was destroyed: %v", err)
	}

	did(s.Create(ctx, "b", nil, Change{}))
	did(s.Revoke(ctx, "b", "uid:7", Change{}))
	did(s.Revoke(ctx, "b", "uid:7", Change{}))
	if k, err := s.Get(ctx, "b"); err != nil || len(k.Revoked) != 1 {
		t.Errorf("revoked for %v, %v", k.Revoked, err)
	}
	did(s.Reinstate(ctx, "b", "uid:7", Change{}))
	if _, err := s.Reinstate(ctx, "b", "uid:7", Change{}); !errors.Is(err, ErrState) {
		t.Errorf("reinstate who is not revoked: %v", err)
	}
}

// TestElsewhere keeps what is known of a KEK whose key lives elsewhere.
func TestElsewhere(t *testing.T) {
	ctx := t.Context()
	s := openStore(t, t.TempDir())
	c := Change{Backend: "vault"}
	if k, err := s.Disable(ctx, "v", 3, c); err != nil || len(k.Versions) != 1 {
		t.Fatalf("%+v, %v", k, err)
	}
	k, err := s.Get(ctx, "v")
	if err != nil || k.Backend != "vault" {
		t.Fatalf("%+v, %v", k, err)
	}
	for version, ok := range map[int]bool{0: true, 1: true, 2: true, 3: false, 4: true} {
		if err := s.CheckUse(k, version); (err == nil) != ok {
			t.Errorf("version %d: %v", version, err)
		}
	}
	if _, err := s.Destroy(ctx, "v", 3, time.Now(), c); !errors.Is(err, ErrState) {
		t.Errorf("destroyed what is elsewhere: %v", err)
	}
	if k, err = s.Disable(ctx, "v", 0, c); err != nil || s.CheckUse(k, 0) == nil {
		t.Errorf("%v", err)
	}
}

// TestRefusedChange checks that a change is not made that was not logged.
func TestRefusedChange(t *testing.T) {
	ctx := t.Context()
	s := openStore(t, t.TempDir())
	no := errors.New("no")
	if _, err := s.Create(ctx, "a", nil, Change{Log: func(KEK) error { return no }}); !errors.Is(err, no) {
		t.Errorf("%v", err)
	}
	if _, err := s.Get(ctx, "a"); !errors.Is(err, ErrNotFound) {
		t.Errorf("it was created: %v", err)
	}
}

func TestCount(t *testing.T) {
	dir, ctx := t.TempDir(), t.Context()
	s := openStore(t, dir)
	const limit = 1 << 20 // 16 at a time
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 100 {
				if _, err := s.Count(ctx, "a", 1, 1, limit); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if n, err := s.Count(ctx, "a", 1, 1024, limit); err != nil || n != 1424 {
		t.Errorf("%d, %v", n, err)
	}
	if n, err := s.Count(ctx, "a", 11, 1, limit); err != nil || n != 1 {
		t.Errorf("another version: %d, %v", n, err)
	}
	s.Close()
	s = openStore(t, dir)
	n, err := s.Count(ctx, "a", 1, 1, limit)
	if err != nil || n < 1425 || n > 1425+16+1024 {
		t.Errorf("after opening again: %d, %v", n, err)
	}
	sums, err := s.Wraps(ctx, "a")
	if err != nil || len(sums) != 2 || sums[1] < n || sums[11] != 16 {
		t.Errorf("%v, %v", sums, err)
	}
}

// TestRotatedAtOnce rotates a KEK many times at once.
func TestRotatedAtOnce(t *testing.T) {
	ctx := t.Context()
	s := openStore(t, t.TempDir())
	s.Create(ctx, "a", nil, Change{})
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if _, err := s.Rotate(ctx, "a", 0, Change{}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	k, err := s.Get(ctx, "a")
	if err != nil || k.Current() != 21 {
		t.Errorf("version %d, %v", k.Current(), err)
	}
	seen := make(map[string]bool)
	for i, v := range k.Versions {
		b, _, err := s.Key(k, v.Version)
		if err != nil || v.Version != i+1 || seen[string(b)] {
			t.Errorf("version %d: %v", v.Version, err)
		}
		seen[string(b)] = true
	}
}

func FuzzDecode(f *testing.F) {
	dir := f.TempDir()
	s, err := Open(context.Background(), dir, "")
	if err != nil {
		f.Fatal(err)
	}
	defer s.Close()
	k, err := s.Create(context.Background(), "a", nil, Change{})
	if err != nil {
		f.Fatal(err)
	}
	good, err := s.encode(k)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := s.decode("a", b)
		if err == nil && fmt.Sprint(got) != fmt.Sprint(k) {
			t.Errorf("decoded %q", b)
		}
	})
}

// TestClockMoved moves the clock by a day while a key waits to be destroyed. It
// goes by the clock, early or late, but what is gone does not come back.
func TestClockMoved(t *testing.T) {
	ctx := t.Context()
	s := openStore(t, t.TempDir())
	now := time.Now()
	s.now = func() time.Time { return now }
	sweep := func(what string, want int) {
		t.Helper()
		swept := 0
		if err := sweep(s, func(KEK, []int) error { swept++; return nil }); err != nil || swept != want {
			t.Errorf("%s: %d swept, want %d, %v", what, swept, want, err)
		}
	}
	if _, err := s.Create(ctx, "a", nil, Change{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Rotate(ctx, "a", 0, Change{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Destroy(ctx, "a", 1, now.Add(2*time.Hour), Change{}); err != nil {
		t.Fatal(err)
	}
	day := 24 * time.Hour
	now = now.Add(-day)
	sweep("back", 0)
	if _, err := s.Enable(ctx, "a", 1, Change{}); err != nil {
		t.Errorf("what is still there: %v", err)
	}
	if _, err := s.Destroy(ctx, "a", 1, now.Add(2*time.Hour), Change{}); err != nil {
		t.Fatal(err)
	}
	now = now.Add(day)
	sweep("forward", 1)
	now = now.Add(-day)
	sweep("back again", 0)
	if _, _, err := key(s, "a", 1); !errors.Is(err, ErrNotFound) {
		t.Errorf("what was destroyed: %v", err)
	}
	if _, err := s.Enable(ctx, "a", 1, Change{}); !errors.Is(err, ErrState) {
		t.Errorf("enable what was destroyed: %v", err)
	}
	if _, version, err := key(s, "a", 0); err != nil || version != 2 {
		t.Errorf("the other version: %+v, %v", version, err)
	}
}
