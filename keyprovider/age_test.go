package keyprovider

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

func TestAgeRecipientsWrapWithoutABroker(t *testing.T) {
	fipstest.Refused(t, fipstest.Age)
	id, err := age.GenerateHybridIdentity()
	if err != nil {
		t.Fatal(err)
	}
	other, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "key.txt")
	if err := os.WriteFile(file, []byte(id.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	to, otherTo := id.Recipient().String(), other.Recipient().String()
	ci, holder := New(nil, Config{}), New(nil, Config{AgeIdentities: []string{file}})
	both := wrapFor(t, ci, otherTo, to)
	if list, err := wireformat.ParseAnnotation(both); err != nil || len(list) != 2 || list[1].Recipient != to || list[1].KEKID != "" {
		t.Fatalf("%s: %v", both, err)
	}
	if err := unwraps(t, holder, both); err != nil {
		t.Error(err)
	}
	if err := unwraps(t, holder, both, to); err != nil {
		t.Error(err)
	}
	for name, test := range map[string]struct {
		p    *Provider
		ids  []string
		want string
	}{
		"another recipient's key": {holder, []string{otherTo}, "no identity in age-identities unwraps it"},
		"a KEK":                   {holder, []string{"team-a"}, `and the key given is "team-a"`},
		"no identities":           {ci, nil, "age-identities is not set"},
	} {
		if err := unwraps(t, test.p, both, test.ids...); !errors.Is(err, ErrWrongKEK) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
	}
}

// TestAgeRecipientTypedWrongIsNoKEK asks no broker for what looks like one.
func TestAgeRecipientTypedWrongIsNoKEK(t *testing.T) {
	fipstest.Refused(t, fipstest.Age)
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	to := id.Recipient().String()
	p := New(nil, Config{})
	for _, name := range []string{"age1", "age1x", to[:len(to)-1], strings.ToUpper(to), id.String(), strings.ToLower(id.String()), "AGE-PLUGIN-YUBIKEY-1QQQ", "age-plugin-yubikey-1qqq"} {
		_, err := p.WrapKey(t.Context(), named(name), []byte(secret))
		if !errors.Is(err, ErrInput) || strings.Contains(strings.ToUpper(err.Error()), id.String()[:30]) || strings.Contains(err.Error(), "1qqq") {
			t.Errorf("%.20s: %v", name, err)
		}
	}
	if _, err := New(nil, Config{Format: FormatOriginal}).WrapKey(t.Context(), named(to), []byte(secret)); !errors.Is(err, ErrInput) {
		t.Errorf("in the original's format: %v", err)
	}
}
