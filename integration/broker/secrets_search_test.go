package broker

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// secrets are the bytes that must not be found anywhere, by name.
type secrets struct {
	needles []needle
}

// needle is a half of a secret, in one of the forms that it may be written in.
type needle struct {
	secret, form string
	text         []byte
}

// add adds a secret. Half of it reveals too much already.
func (s *secrets) add(name string, secret []byte) {
	for i, half := range [][]byte{secret[:len(secret)/2], secret[len(secret)/2:]} {
		name := fmt.Sprintf("%s, half %d", name, i+1)
		decimal := strings.Trim(fmt.Sprint(half), "[]")
		for form, text := range map[string]string{
			"raw":                 string(half),
			"hex":                 hex.EncodeToString(half),
			"HEX":                 strings.ToUpper(hex.EncodeToString(half)),
			"hex with colons":     strings.ReplaceAll(fmt.Sprintf("% x", half), " ", ":"),
			"hex with spaces":     fmt.Sprintf("% x", half),
			"Go's quoted":         strings.Trim(fmt.Sprintf("%q", half), `"`),
			"decimal":             decimal,
			"decimal with commas": strings.ReplaceAll(decimal, " ", ","),
		} {
			s.needles = append(s.needles, needle{name, form, []byte(text)})
		}
		for form, encoding := range map[string]*base64.Encoding{"base64": base64.RawStdEncoding, "base64url": base64.RawURLEncoding} {
			for before := range 3 {
				// What comes before and after shares characters with it, so those
				// are not looked for.
				text := encoding.EncodeToString(append(make([]byte, before), half...))
				from := (before*8 + 5) / 6
				to := (before + len(half)) * 8 / 6
				s.needles = append(s.needles, needle{name, fmt.Sprintf("%s at %d", form, before), []byte(text[from:to])})
			}
		}
	}
}

// in returns which secrets are in b, in what form, also where it is cut into lines.
func (s *secrets) in(b []byte) (found []string) {
	texts := [][]byte{b}
	if bytes.IndexByte(b, 0) < 0 { // text
		texts = append(texts, []byte(strings.NewReplacer("\n", "", "\r", "", `\n`, "").Replace(string(b))))
	}
	for _, n := range s.needles {
		for _, text := range texts {
			if bytes.Contains(text, n.text) {
				found = append(found, n.secret+" in "+n.form)
				break
			}
		}
	}
	slices.Sort(found)
	return found
}

// below searches the files below dir, and their names.
func (s *secrets) below(t testing.TB, dir string) map[string][]string {
	t.Helper()
	all := make(map[string][]string)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if found := append(s.in(b), s.in([]byte(path))...); len(found) > 0 {
			all[path] = found
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// observed are the environments and the command lines of all processes, as
// long as they are watched.
type observed struct {
	seen map[string]string // what a process has, and which one
	quit chan struct{}
	done sync.WaitGroup
}

func watchProcesses() *observed {
	w := &observed{seen: map[string]string{}, quit: make(chan struct{})}
	w.done.Go(func() {
		for {
			w.look()
			select {
			case <-w.quit:
				w.look() // at those that were started a moment ago
				return
			case <-time.After(3 * time.Millisecond):
			}
		}
	})
	return w
}

// look notes what processes have now.
func (w *observed) look() {
	self := fmt.Sprint(os.Getpid())
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, cmdline := range files {
		pid := filepath.Base(filepath.Dir(cmdline))
		for _, name := range []string{cmdline, filepath.Dir(cmdline) + "/environ", filepath.Dir(cmdline) + "/comm"} {
			if b, err := os.ReadFile(name); err == nil && len(b) > 0 && pid != self {
				w.seen[string(b)] = name
			}
		}
	}
}

// stop returns what processes had, by place.
func (w *observed) stop() map[string]string {
	close(w.quit)
	w.done.Wait()
	return maps.Clone(w.seen)
}
