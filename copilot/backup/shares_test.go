package backup

import (
	"crypto/fips140"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/internal/fips"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

func ExampleNewShares() {
	shares, recipient, err := NewShares(3, 5)
	if err != nil {
		panic(err)
	}
	fmt.Println(strings.HasPrefix(recipient.String(), "age1pq1"))
	var given []Share
	for _, text := range []string{shares[4].String(), shares[0].String(), strings.ToLower(shares[2].String())} {
		s, err := ParseShare(text)
		if err != nil {
			panic(err)
		}
		given = append(given, s)
	}
	_, err = Combine(given)
	fmt.Println(err)
	// Output:
	// true
	// <nil>
}

// TestEachTypingErrorIsFound changes each character of a share.
func TestEachTypingErrorIsFound(t *testing.T) {
	fipstest.Refused(t, fipstest.Backup)
	shares, _, err := NewShares(2, 2)
	if err != nil {
		t.Fatal(err)
	}
	text := shares[0].String()
	for i := len(shareText); i < len(text); i++ {
		if text[i] == '-' {
			continue
		}
		other := byte('7')
		if text[i] == other {
			other = '8'
		}
		if s, err := ParseShare(text[:i] + string(other) + text[i+1:]); err == nil {
			t.Errorf("character %d: %+v", i, s)
		}
	}
}

// TestRefusedInFIPSOnlyMode runs this test again where Go refuses what FIPS 140-3 does not
// approve.
func TestRefusedInFIPSOnlyMode(t *testing.T) {
	if fips140.Enforced() {
		_, _, err := NewShares(2, 3)
		_, open := Open(strings.NewReader(""))
		_, parse := ParseRecipients(nil)
		_, read := ReadIdentities(os.DevNull)
		_, combine := Combine(nil)
		for _, err := range []error{err, open, parse, read, combine} {
			if !errors.Is(err, fips.ErrNotApproved) {
				t.Error(err)
			}
		}
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestRefusedInFIPSOnlyMode$", "-test.v")
	cmd.Env = append(os.Environ(), "GODEBUG=fips140=only")
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS") {
		t.Errorf("%v\n%s", err, out)
	}
}

func FuzzParseShare(f *testing.F) {
	fipstest.Refused(f, fipstest.Backup)
	shares, _, err := NewShares(2, 3)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(shares[0].String())
	f.Add("copilot-share-")
	f.Fuzz(func(t *testing.T, text string) {
		s, err := ParseShare(text)
		if err != nil {
			return
		}
		if again, err := ParseShare(s.String()); err != nil || again.String() != s.String() {
			t.Errorf("%q is read as %q", text, s)
		}
	})
}
