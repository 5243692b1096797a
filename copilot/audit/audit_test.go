package audit

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func testKey(testing.TB) Key { return Key("a key of thirty-two bytes, it is") }

func openLog(t testing.TB, name string) *Log {
	t.Helper()
	l, err := OpenFile(name, testKey(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// written returns the lines of a log with entries for the KEKs named.
func written(t testing.TB, keks ...string) []string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "log")
	l := openLog(t, name)
	for _, kek := range keks {
		if err := l.Write(Entry{Action: "export", KEK: kek, Who: "uid:0", From: "@", Verdict: Allowed}); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return linesOf(t, name)
}

func linesOf(t testing.TB, name string) []string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return strings.SplitAfter(strings.TrimSuffix(string(b), "\n"), "\n")
}

func verify(t testing.TB, lines []string, since ...Head) Report {
	t.Helper()
	report, err := Verify(strings.NewReader(strings.Join(lines, "")), testKey(t), since...)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

func join(parts ...[]string) []string {
	var all []string
	for _, p := range parts {
		all = append(all, p...)
	}
	for i, l := range all {
		all[i] = strings.TrimSuffix(l, "\n") + "\n"
	}
	return all
}

func TestVerify(t *testing.T) {
	w := written(t, "a", "b", "c", "d", "e")
	other := written(t, "x", "y", "z")
	good := verify(t, join(w))
	if good.Lines != 5 || len(good.Heads) != 1 || len(good.Problems)+len(good.Notes) != 0 {
		t.Fatalf("%+v", good)
	}
	all := good.Heads[0]
	three := verify(t, join(w[:3])).Heads[0]
	for name, test := range map[string]struct {
		lines []string
		since []Head
		want  string // in the first problem, or none
	}{
		"two chains":              {join(w[:2], other[:1], w[2:], other[1:]), nil, ""},
		"empty":                   {nil, nil, ""},
		"changed":                 {join(w[:1], []string{strings.Replace(w[1], `"b"`, `"q"`, 1)}, w[2:]), nil, "line 2: it was changed"},
		"changed verdict":         {join(w[:4], []string{strings.Replace(w[4], "allowed", "denied", 1)}), nil, "line 5: it was changed"},
		"removed":                 {join(w[:1], w[2:]), nil, "the lines from 2 to 2 are missing"},
		"first removed":           {join(w[1:]), nil, "begins with line 2"},
		"swapped":                 {join(w[:1], w[2:3], w[1:2], w[3:]), nil, "the lines from 2 to 2 are missing"},
		"twice":                   {join(w[:2], w[1:]), nil, "line 3 is line 2 of chain"},
		"moved to another chain":  {join(w[:2], []string{strings.Replace(other[1], `"y"`, `"c"`, 1)}), nil, "it was changed"},
		"end removed":             {join(w[:4]), []Head{all}, "which were there before"},
		"end removed, unknown":    {join(w[:4]), nil, ""},
		"all removed":             {nil, []Head{all}, "the lines of chain"},
		"old ones put away":       {join(w[3:]), []Head{three}, ""},
		"one more of them":        {join(w[2:]), []Head{three}, ""},
		"all but the last":        {join(w[4:]), []Head{all}, ""},
		"too many put away":       {join(w[4:]), []Head{three}, "begins with line 5"},
		"nothing since":           {join(w), []Head{all}, ""},
		"another at that place":   {join(w), []Head{{all.Chain, 3, all.MAC}}, "is another line 3"},
		"another key's":           {join([]string{string(sealed(t, Key("another key, of as many bytes as"), 1))}), nil, "another master key"},
		"cut lines are noted":     {join(w[:2], []string{w[2][:20]}, w[2:]), nil, ""},
		"a line with more in it":  {join([]string{strings.Replace(w[0], `{`, `{"a":1,`, 1)}), nil, "it was changed"},
		"a line with two MACs":    {join([]string{strings.TrimSuffix(w[0], "}\n") + `,"mac":"` + all.MAC + `"}`}), nil, "it was changed"},
		"a line without a MAC":    {join(w[:2], []string{`{"chain":"` + all.Chain + `","seq":3}`}), nil, ""},
		"the same line unchained": {join(w[:1], []string{string(sealed(t, testKey(t), 7))}), nil, "begins with line 7"},
	} {
		r := verify(t, test.lines, test.since...)
		first := strings.Join(r.Problems, "\n")
		if test.want == "" && first != "" || !strings.Contains(first, test.want) {
			t.Errorf("%s: %q", name, first)
		}
	}
	if r := verify(t, join(w[:2], []string{w[2][:20]}, w[2:])); len(r.Notes) != 1 || r.Lines != 5 {
		t.Errorf("%+v", r)
	}
	if h, err := ParseHead(all.String()); err != nil || h != all {
		t.Errorf("%v, %v", h, err)
	}
	for _, s := range []string{"", "a/b/c", "a/0/c", "/1/c", "a/1", "a/1/c/d"} {
		if _, err := ParseHead(s); err == nil {
			t.Errorf("%q tells a line", s)
		}
	}
}

func sealed(t testing.TB, key Key, seq int64) []byte {
	t.Helper()
	text, _, err := key.seal(line{Chain: "c", Seq: seq, Entry: Entry{Action: "export"}})
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// TestGoesOn opens a log again, after a clean end and after a crash.
func TestGoesOn(t *testing.T) {
	name := filepath.Join(t.TempDir(), "log")
	for i, after := range []string{"", `{"chain":"cut sho`, "\n\n", "not a line\n", ""} {
		l := openLog(t, name)
		if err := l.Write(Entry{Action: fmt.Sprint(i)}); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenFile(name, testKey(t)); err == nil || !strings.Contains(err.Error(), "in use by another") {
			t.Errorf("opened twice: %v", err)
		}
		l.Close()
		if err := l.Write(Entry{}); err == nil {
			t.Error("wrote to a closed log")
		}
		f, err := os.OpenFile(name, os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		f.WriteString(after)
		f.Close()
	}
	r := verify(t, linesOf(t, name))
	if r.Lines != 5 || len(r.Heads) != 1 || len(r.Problems) != 0 || len(r.Notes) != 2 {
		t.Errorf("%+v", r)
	}
	if info, err := os.Stat(name); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if _, err := OpenFile(name, Key("another key, of as many bytes as")); err == nil || !strings.Contains(err.Error(), "copilot audit verify") {
		t.Errorf("goes on a log of another key: %v", err)
	}
}

func TestReopen(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "log")
	l := openLog(t, name)
	for i := range 3 {
		l.Write(Entry{Action: fmt.Sprint(i)})
		if i == 1 {
			if err := os.Rename(name, name+".1"); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.Reopen(); err != nil {
			t.Fatal(err)
		}
	}
	old, now := linesOf(t, name+".1"), linesOf(t, name)
	if r := verify(t, join(old, now)); len(r.Problems) != 0 || r.Lines != 4 || len(old) != 2 {
		t.Errorf("%+v", r)
	}
	if r := verify(t, join(now)); len(r.Problems) != 1 {
		t.Errorf("the newer alone: %+v", r)
	}
}

// TestClockMoved writes entries whose times are not in order. The log's order is
// that in which it was written, not that of the clock.
// TestFileLost deletes, moves, replaces and truncates the file under a log that is
// being written: lines that come after are in the file of that name, and show that
// others are missing.
func TestFileLost(t *testing.T) {
	for name, test := range map[string]struct {
		lose     func(t *testing.T, file string) error
		reason   string
		problems int // in the file alone
	}{
		"deleted": {func(_ *testing.T, file string) error { return os.Remove(file) }, "its file was deleted", 1},
		"moved":   {func(_ *testing.T, file string) error { return os.Rename(file, file+".1") }, "its file was moved or replaced", 1},
		"replaced": {func(t *testing.T, file string) error {
			if err := os.WriteFile(file+".new", []byte("half a li"), 0o600); err != nil {
				t.Fatal(err)
			}
			return os.Rename(file+".new", file)
		}, "its file was deleted", 1},
		"truncated": {func(_ *testing.T, file string) error { return os.Truncate(file, 0) }, "its file was truncated", 1},
		"kept":      {func(*testing.T, string) error { return nil }, "", 0},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "log")
			l := openLog(t, file)
			write := func(kek string) {
				t.Helper()
				if err := l.Write(Entry{Action: "export", KEK: kek, Who: "uid:0", From: "@", Verdict: Allowed}); err != nil {
					t.Fatal(err)
				}
			}
			write("a")
			write("b")
			if err := test.lose(t, file); err != nil {
				t.Fatal(err)
			}
			write("c")
			write("d")
			text := strings.Join(linesOf(t, file), "")
			if !strings.Contains(text, `"kek":"c"`) || !strings.Contains(text, `"kek":"d"`) || strings.Count(text, `"action":"continue"`) != min(test.problems, 1) || !strings.Contains(text, test.reason) {
				t.Errorf("the log: %s", text)
			}
			if r := verify(t, linesOf(t, file)); len(r.Problems) != test.problems {
				t.Errorf("%+v", r)
			}
			if name == "moved" {
				if r := verify(t, join(linesOf(t, file+".1"), linesOf(t, file))); r.Lines != 5 || len(r.Problems) != 0 {
					t.Errorf("with the file that was moved: %+v", r)
				}
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			write2 := openLog(t, file)
			if err := write2.Write(Entry{Action: "export", KEK: "e", Who: "uid:0", From: "@", Verdict: Allowed}); err != nil {
				t.Error(err)
			}
		})
	}
	file := filepath.Join(t.TempDir(), "log")
	nowhere := openLog(t, file)
	entry := Entry{Action: "export", KEK: "a", Who: "uid:0", From: "@", Verdict: Allowed}
	if err := errors.Join(nowhere.Write(entry), os.Rename(file, file+".1"), os.Symlink(os.DevNull, file)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := nowhere.Write(entry); !errors.Is(err, ErrUnavailable) {
			t.Errorf("a device in its place: %v", err)
		}
	}
	if err := errors.Join(os.Rename(file+".1", file), nowhere.Write(entry)); err != nil {
		t.Errorf("the file is back: %v", err)
	}
	if r := verify(t, linesOf(t, file)); r.Lines != 2 || len(r.Problems) != 0 {
		t.Errorf("%+v", r)
	}

	dir := filepath.Join(t.TempDir(), "dir")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	l := openLog(t, filepath.Join(dir, "log"))
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := l.Write(Entry{Action: "export"}); !errors.Is(err, ErrUnavailable) {
		t.Errorf("its directory is gone: %v", err)
	}
}

func TestClockMoved(t *testing.T) {
	name := filepath.Join(t.TempDir(), "log")
	l := openLog(t, name)
	now := time.Now().UTC()
	for _, moved := range []time.Duration{0, 24 * time.Hour, -24 * time.Hour, 0} {
		if err := l.write([]*waiting{{entry: Entry{Action: moved.String(), Time: now.Add(moved)}}}); err != nil {
			t.Fatal(err)
		}
	}
	lines := linesOf(t, name)
	if r := verify(t, lines); r.Lines != 4 || len(r.Problems)+len(r.Notes) != 0 {
		t.Errorf("%+v", r)
	}
	// In the order of the clock they are no log.
	if r := verify(t, []string{lines[2], lines[0], lines[3], lines[1]}); len(r.Problems) == 0 {
		t.Error("lines in another order are taken")
	}
}

// TestManyAtOnce has many callers write: each line is there once.
func TestManyAtOnce(t *testing.T) {
	name := filepath.Join(t.TempDir(), "log")
	l := openLog(t, name)
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			for j := range 10 {
				if err := l.Write(Entry{Action: fmt.Sprintf("%d %d", i, j), Reason: strings.Repeat("ä", 1000)}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	lines := linesOf(t, name)
	if r := verify(t, lines); r.Lines != 640 || len(r.Problems)+len(r.Notes) != 0 {
		t.Errorf("%+v", r)
	}
	for i := range 64 {
		for j := range 10 {
			if n := strings.Count(strings.Join(lines, ""), fmt.Sprintf(`"action":"%d %d"`, i, j)); n != 1 {
				t.Errorf("%d %d is there %d times", i, j, n)
			}
		}
	}
}

// TestFullDisk writes to a log that may not grow any more, and then may again.
func TestFullDisk(t *testing.T) {
	if os.Getenv("AUDIT_FULL_DISK") == "" {
		// The limit is the process's, so this needs one of its own.
		testInOwnProcess(t, "AUDIT_FULL_DISK=1")
		return
	}
	name := filepath.Join(t.TempDir(), "log")
	l := openLog(t, name)
	if err := l.Write(Entry{Action: "1"}); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	limitFiles(t, uint64(info.Size())+40) // in the middle of a line
	for range 2 {
		if err := l.Write(Entry{Action: "2"}); err == nil || !strings.Contains(err.Error(), "can't be written") {
			t.Errorf("written to a full disk: %v", err)
		}
	}
	limitFiles(t, ^uint64(0))
	if err := l.Write(Entry{Action: "3"}); err != nil {
		t.Fatal(err)
	}
	if r := verify(t, linesOf(t, name)); r.Lines != 2 || len(r.Problems)+len(r.Notes) != 0 {
		t.Errorf("%+v", r)
	}
}

// limitFiles limits the size of files that the process writes.
func limitFiles(t *testing.T, size uint64) {
	t.Helper()
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: size, Max: ^uint64(0)}); err != nil {
		t.Fatal(err)
	}
}

// TestNewChainOnAFullDisk opens a log that lost lines. The first line of the chain that begins
// then can't be written at once.
func TestNewChainOnAFullDisk(t *testing.T) {
	if os.Getenv("AUDIT_FULL_DISK") == "" {
		testInOwnProcess(t, "AUDIT_FULL_DISK=1")
		return
	}
	name := filepath.Join(t.TempDir(), "log")
	l := openLog(t, name)
	for _, action := range []string{"1", "2", "3"} {
		if err := l.Write(Entry{Action: action}); err != nil {
			t.Fatal(err)
		}
	}
	known := l.Head()
	l.Close()
	left := strings.Join(linesOf(t, name)[:2], "")
	if err := os.WriteFile(name, []byte(left), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := OpenFile(name, testKey(t), known)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	limitFiles(t, uint64(len(left)))
	if err := l.Write(Entry{Action: "4"}); err == nil {
		t.Error("written to a full disk")
	}
	limitFiles(t, ^uint64(0))
	if err := l.Write(Entry{Action: "5"}); err != nil {
		t.Fatal(err)
	}
	if h := l.Head(); h.Chain == known.Chain || l.Ended() != known {
		t.Errorf("it goes on as %s after %s", h, l.Ended())
	}
	r, err := VerifyTo(strings.NewReader(strings.Join(linesOf(t, name), "")), testKey(t), Known{Written: []Head{l.Head()}})
	if err != nil || len(r.Problems) != 1 || !strings.Contains(r.Problems[0], "began after its line 3") {
		t.Errorf("%+v, %v", r, err)
	}
}

func FuzzVerify(f *testing.F) {
	w := written(f, "a", "b")
	f.Add([]byte(strings.Join(w, "")))
	f.Add(bytes.Repeat([]byte("\n"), 10))
	key := testKey(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := Verify(bytes.NewReader(b), key)
		if err == nil && r.Lines > 2 && len(r.Problems) == 0 {
			t.Errorf("more lines than were written: %q", b)
		}
	})
}

func BenchmarkWrite(b *testing.B) {
	l := openLog(b, filepath.Join(b.TempDir(), "log"))
	b.SetParallelism(32)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := l.Write(Entry{Action: "export", KEK: "team-a", Who: "spiffe://example.com/node/7", From: "10.0.0.7:41022", Verdict: Allowed}); err != nil {
				b.Error(err)
			}
		}
	})
}

// TestLinesSayNoFewerChangesThanThoseBefore reopens a log, in its file and after logrotate
// has moved that away, and writes lines without counting changes.
func TestLinesSayNoFewerChangesThanThoseBefore(t *testing.T) {
	name := filepath.Join(t.TempDir(), "log")
	l := openLog(t, name)
	l.Count(func() int64 { return 7 })
	for i := range 3 {
		if err := l.Write(Entry{Action: "rotate", Who: "uid:0", From: "@", Verdict: Allowed}); err != nil {
			t.Fatal(err)
		}
		known := l.Head()
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if i == 1 {
			if err := os.Rename(name, name+".1"); err != nil {
				t.Fatal(err)
			}
		}
		var err error
		if l, err = OpenFile(name, testKey(t), known); err != nil {
			t.Fatal(err)
		}
		if n := l.Counted(); n != 7 {
			t.Errorf("opened again: %d changes", n)
		}
	}
	l.Close()
}
