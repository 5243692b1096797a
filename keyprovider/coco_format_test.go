package keyprovider

import (
	"bytes"
	"testing"
)

// TestFormatCopilotForGuests has the broker wrap for guests although it would give the KEK out.
func TestFormatCopilotForGuests(t *testing.T) {
	key := bytes.Repeat([]byte("k"), 32)
	b := startBroker(t, map[string][]byte{"team-a": key})
	p := newProvider(t, b.url, Config{Format: FormatCopilot, KBSKEKs: map[string]KBSKEK{"kbs:///default/key/team-a": {"team-a", 1}}})
	for param, kid := range map[string]string{
		"team-a":                    "kbs+external:///copilot/team-a/1",
		"kbs:///default/key/team-a": "kbs:///default/key/team-a",
	} {
		annotation, err := cocoOf(p).WrapKey(t.Context(), named(param), []byte(secret))
		if err != nil {
			t.Fatalf("%s: %v", param, err)
		}
		if got, optsdata := guestUnwrap(t, key, annotation); got != kid || string(optsdata) != secret {
			t.Errorf("%s: kid %s holds %q", param, got, optsdata)
		}
	}
	if n := b.asked(t, "team-a"); n != 0 {
		t.Errorf("the broker was asked %d times for the KEK", n)
	}
}
