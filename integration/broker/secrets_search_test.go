package broker

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
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
	"unicode/utf8"
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
			"Go's quoted":         strings.Trim(fmt.Sprintf("%q", wholeRunes(half)), `"`),
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

// wholeRunes returns b without the bytes at its ends that may be written as one
// rune with what comes before or after them.
func wholeRunes(b []byte) []byte {
	for n := 0; n < utf8.UTFMax-1 && len(b) > 0 && !utf8.RuneStart(b[0]); n++ {
		b = b[1:]
	}
	for n := 1; n < utf8.UTFMax && n <= len(b); n++ {
		if last := b[len(b)-n:]; utf8.RuneStart(last[0]) {
			if !utf8.FullRune(last) {
				b = b[:len(b)-n]
			}
			break
		}
	}
	return b
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

// TestSearchFindsSecrets writes secrets in each form, also such whose halves
// meet in the middle of a rune.
func TestSearchFindsSecrets(t *testing.T) {
	for n := range 2000 {
		secret := make([]byte, 32)
		rand.Read(secret)
		switch n % 4 { // what is in the middle
		case 1:
			copy(secret[15:], "é")
		case 2:
			copy(secret[14:], "€")
		case 3:
			copy(secret[13:], "\U0001F511")
		}
		var all secrets
		all.add("planted", secret)
		for form, text := range map[string]string{
			"raw": string(secret), "hex": hex.EncodeToString(secret), "HEX": strings.ToUpper(hex.EncodeToString(secret)), "decimal": fmt.Sprint(secret),
			"base64": base64.StdEncoding.EncodeToString(secret), "base64 of more": base64.StdEncoding.EncodeToString(append([]byte(`{"k":"`), secret...)),
			"base64url": base64.URLEncoding.EncodeToString(append([]byte("x"), secret...)), "Go's quoted": fmt.Sprintf("%q", secret),
			"Go's quoted between runes": fmt.Sprintf("%q", "\xc3"+string(secret)+"\xa9"),
			"lines":                     string(pem.EncodeToMemory(&pem.Block{Type: "X", Bytes: append(make([]byte, 40), secret...)})),
		} {
			found := all.in([]byte("before " + text + " after"))
			for _, half := range []string{"planted, half 1", "planted, half 2"} {
				if !slices.ContainsFunc(found, func(f string) bool { return strings.HasPrefix(f, half) }) {
					t.Errorf("%s of %x is not found in %s: %v", half, secret, form, found)
				}
			}
		}
	}
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
