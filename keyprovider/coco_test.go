package keyprovider

import (
	"bufio"
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/wireformat"
	"github.com/ctrlplane/pilot/processor"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
)

// guestUnwrap unwraps a layer key as a guest of Confidential Containers does, by its document
// confidential-data-hub/docs/IMAGE_ENCRYPTION.md: fields in standard base64, and AES-256-GCM
// with the tag behind the ciphertext.
func guestUnwrap(t testing.TB, kek, annotation []byte) (kid string, optsdata []byte) {
	t.Helper()
	var packet map[string]string
	if err := json.Unmarshal(annotation, &packet); err != nil {
		t.Fatal(err)
	}
	if len(packet) != 4 || packet["wrap_type"] != "A256GCM" {
		t.Fatalf("annotation %s", annotation)
	}
	iv, ivErr := base64.StdEncoding.DecodeString(packet["iv"])
	data, dataErr := base64.StdEncoding.DecodeString(packet["wrapped_data"])
	block, err := aes.NewCipher(kek)
	if err := errors.Join(ivErr, dataErr, err); err != nil || len(kek) != 32 {
		t.Fatalf("KEK of %d bytes: %v", len(kek), err)
	}
	gcm, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		t.Fatal(err)
	}
	if optsdata, err = gcm.Open(nil, nil, append(iv, data...), nil); err != nil {
		t.Fatalf("a guest does not unwrap %s: %v", annotation, err)
	}
	return packet["kid"], optsdata
}

// cocoOf returns the key provider attestation-agent of p.
func cocoOf(p *Provider) processor.KeyProvider { return CoCo(func() *Provider { return p }) }

// TestCoCoVectors unwraps what another implementation, in Python, has made of the documents.
func TestCoCoVectors(t *testing.T) {
	b, err := os.ReadFile("testdata/coco-annotations.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); n++ {
		var v struct{ KEK, Optsdata, Annotation []byte }
		if err := json.Unmarshal(lines.Bytes(), &v); err != nil {
			t.Fatal(err)
		}
		packet, err := wireformat.ParseCoCoPacket(v.Annotation)
		if err != nil {
			t.Fatal(err)
		}
		p := newProvider(t, startBroker(t, map[string][]byte{"team-a": v.KEK}).url, Config{KBSKEKs: map[string]KBSKEK{packet.KID: {"team-a", 1}}})
		if got, err := p.UnwrapKey(t.Context(), nil, v.Annotation); err != nil || !bytes.Equal(got, v.Optsdata) {
			t.Errorf("%s: %q, %v", v.Annotation, got, err)
		}
	}
	if n != 5 {
		t.Errorf("%d vectors were read, not 5", n)
	}
}

func TestGuestsUnwrapWhatIsWrappedForThem(t *testing.T) {
	key := bytes.Repeat([]byte("k"), 32)
	b := startBroker(t, map[string][]byte{"team-a": key, "a/b": key, "short": make([]byte, 16)})
	p := newProvider(t, b.url, Config{KBSKEKs: map[string]KBSKEK{
		"kbs:///default/key/team-a": {"team-a", 1}, "kbs:///default/key/slash": {"a/b", 1}, "kbs:///default/key/short": {"short", 1}, "kbs:///default/key/later": {"team-a", 2},
	}})
	for param, kid := range map[string]string{
		"team-a":                         "kbs+external:///copilot/team-a/1",
		"kbs:///default/key/team-a":      "kbs:///default/key/team-a",
		"/default/key/team-a":            "kbs:///default/key/team-a",
		"keyid=kbs:///default/key/slash": "kbs:///default/key/slash",
		"keyid=/default/key/team-a::algorithm=A256GCM::sample=false": "kbs:///default/key/team-a",
		"kbs+external:///copilot/team-a/1":                           "kbs+external:///copilot/team-a/1",
	} {
		annotation, err := cocoOf(p).WrapKey(t.Context(), named(param), []byte(secret))
		if err != nil {
			t.Errorf("%s: %v", param, err)
			continue
		}
		if got, optsdata := guestUnwrap(t, key, annotation); got != kid || string(optsdata) != secret {
			t.Errorf("%s: kid %s holds %q", param, got, optsdata)
		}
		if err := unwraps(t, p, annotation); err != nil {
			t.Errorf("%s: %v", param, err)
		}
		// CoCo's tools name a KBS where ocicrypt's name keys.
		if got, err := cocoOf(p).UnwrapKey(t.Context(), named("cc_kbc::http://kbs:8080"), annotation); err != nil || string(got) != secret {
			t.Errorf("%s: %q, %v", param, got, err)
		}
	}
	for param, want := range map[string]string{
		"nobody":                                "no such KEK",
		"short":                                 "has 16 bytes, and A256GCM takes 32",
		"a/b":                                   "can't be part of a KBS resource's URI",
		"kbs:///default/key/nobody":             `add "kbs:///default/key/nobody=KEK" to kbs-keks`,
		"kbs://other:8080/default/key/team-a":   "it is of the KBS at other:8080",
		"kbs:///default/key/short":              "has 16 bytes",
		"kbs:///default/key/later":              "is version 2 of KEK \"team-a\", and its current version is 1",
		"kbs:///default/key":                    "is not the URI of a KBS resource",
		"kbs:///default/key/../x":               "is not the URI of a KBS resource",
		"kbs+external:///copilot/team-a/2":      "is version 2 of KEK",
		"age1pq1abc":                            "a recipient of age is no KEK",
		"AGE-SECRET-KEY-1ABC":                   "a private key of age is named",
		"sample=true":                           "sample wraps with a key that everybody knows",
		"keyid=kbs:///a/b/c::keypath=/tmp/key":  "keypath names a KEK in a file",
		"keyid=kbs:///a/b/c::algorithm=A256CTR": `algorithm "A256CTR" is not A256GCM`,
		"keyid=kbs:///a/b/c::x=y":               `"x" is none of keyid and algorithm`,
		"algorithm=A256GCM":                     "keyid is missing",
		"Enabled":                               "name one, as in provider:attestation-agent:",
	} {
		_, err := cocoOf(p).WrapKey(t.Context(), named(param), []byte(secret))
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "AGE-SECRET-KEY") {
			t.Errorf("%s: %v, want %q", param, err, want)
		}
	}
	if _, err := cocoOf(p).WrapKey(t.Context(), named("team-a", "a/b"), []byte(secret)); !errors.Is(err, ErrInput) || !strings.Contains(err.Error(), "holds one KEK") {
		t.Errorf("two KEKs: %v", err)
	}

	// A guest gets the version that the kid names, whatever is current.
	old, err := cocoOf(p).WrapKey(t.Context(), named("team-a"), []byte(secret))
	if err != nil {
		t.Fatal(err)
	}
	mapped, err := cocoOf(p).WrapKey(t.Context(), named("kbs:///default/key/team-a"), []byte(secret))
	if err != nil {
		t.Fatal(err)
	}
	b.rotate(t, "team-a", 1)
	for _, annotation := range [][]byte{old, mapped} {
		if err := unwraps(t, p, annotation); err != nil {
			t.Errorf("after a rotation: %v", err)
		}
	}
	if annotation, err := cocoOf(p).WrapKey(t.Context(), named("team-a"), []byte(secret)); err != nil || !bytes.Contains(annotation, []byte("/copilot/team-a/2")) {
		t.Errorf("after a rotation: %s, %v", annotation, err)
	}
	if _, err := cocoOf(p).WrapKey(t.Context(), named("kbs:///default/key/team-a"), []byte(secret)); err == nil || !strings.Contains(err.Error(), "its current version is 2") {
		t.Errorf("after a rotation: %v", err)
	}
}

func TestBadCoCoAnnotationsAreRefused(t *testing.T) {
	b := startBroker(t, map[string][]byte{"team-a": nil, "team-b": nil, "short": make([]byte, 16)})
	p := newProvider(t, b.url, Config{KBSKEKs: map[string]KBSKEK{"kbs:///default/key/team-a": {"team-a", 1}, "kbs:///default/key/team-b": {"team-b", 1}, "kbs:///default/key/short": {"short", 1}}})
	text, err := cocoOf(p).WrapKey(t.Context(), named("kbs:///default/key/team-a"), []byte(secret))
	if err != nil {
		t.Fatal(err)
	}
	var good map[string]string
	if err := json.Unmarshal(text, &good); err != nil {
		t.Fatal(err)
	}
	data, err := base64.StdEncoding.DecodeString(good["wrapped_data"])
	if err != nil {
		t.Fatal(err)
	}
	coded := base64.StdEncoding.EncodeToString
	flipped := bytes.Clone(data)
	flipped[0] ^= 1
	for _, test := range []struct {
		field, value, want string
		is                 error
	}{
		{"kid", "kbs:///default/key/team-b", `KEK "team-b" version 1 does not unwrap this layer key`, ErrWrongKEK},
		{"kid", "kbs+external:///copilot/team-b/1", `KEK "team-b" version 1 does not unwrap this layer key`, ErrWrongKEK},
		{"kid", "kbs+external:///copilot/team-a/2", "no such KEK version", client.ErrNotFound},
		{"kid", "kbs://kbs.example.com/default/key/team-a", "it is of the KBS at kbs.example.com", ErrInput},
		{"kid", "kbs:///default/key/team-c", "to kbs-keks", ErrInput},
		{"kid", "kbs:///default/key/short", `KEK "short" has 16 bytes, and A256GCM takes 32`, ErrWrongKEK},
		{"kid", "http:///default/key/team-a", "is not the URI of a KBS resource", ErrInput},
		{"kid", "", "is not the URI of a KBS resource", ErrInput},
		{"wrapped_data", coded(flipped), "does not unwrap this layer key", ErrWrongKEK},
		{"wrapped_data", coded(data[:len(data)-1]), "does not unwrap this layer key", ErrWrongKEK},
		{"wrapped_data", coded(data[:16]), "wrapped_data of 16 bytes", ErrInput},
		{"wrapped_data", "!", "not that of Confidential Containers", ErrInput},
		{"iv", coded(make([]byte, 12)), "does not unwrap this layer key", ErrWrongKEK},
		{"iv", coded(make([]byte, 16)), "iv of 16 bytes, not 12", ErrInput},
		{"wrap_type", "A256CTR", "A256CTR has no authentication", ErrInput},
		{"wrap_type", "A256KW", `wrap_type "A256KW" is not A256GCM`, ErrInput},
		{"wrap_type", "", `wrap_type "" is not A256GCM`, ErrInput},
		{"provider", "aliyun", `its KEK is in the KMS "aliyun"`, ErrInput},
		{"version", "0.2.0", `version "0.2.0" is not known`, ErrInput},
	} {
		bad := map[string]string{test.field: test.value}
		for name, value := range good {
			if name != test.field {
				bad[name] = value
			}
		}
		annotation, err := json.Marshal(bad)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := p.UnwrapKey(t.Context(), nil, annotation); !errors.Is(err, test.is) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s %q: %q, %v, want %q", test.field, test.value, got, err, test.want)
		}
	}

	// Its own annotation is no CoCo packet with the same method.
	own := fmt.Sprintf(`{"method":"A256GCM","kekId":"team-a","kekVersion":1,"iv":%q,"wrappedKey":%q}`, good["iv"], good["wrapped_data"])
	if got, err := p.UnwrapKey(t.Context(), nil, []byte(own)); !errors.Is(err, ErrInput) {
		t.Errorf("%s: %q, %v", own, got, err)
	}
}

// TestServiceTellsTheTwoKeyProvidersApart: ocicrypt passes the parameters of all key
// providers to each.
func TestServiceTellsTheTwoKeyProvidersApart(t *testing.T) {
	p := newProvider(t, startBroker(t, map[string][]byte{"team-a": nil}).url, Config{})
	wrap := func(names []string, params map[string]string) (string, error) {
		t.Helper()
		encoded := map[string][][]byte{}
		for name, param := range params {
			encoded[name] = named(param)
		}
		ec, err := json.Marshal(map[string]any{"Parameters": encoded})
		if err != nil {
			t.Fatal(err)
		}
		s := Service{Provider: p, CoCo: cocoOf(p), Names: names}
		out, err := s.answer(t.Context(), ocicryptclient.Wrap, fmt.Appendf(nil, `{"op":"keywrap","keywrapparams":{"ec":%s,"optsdata":"c2VjcmV0"}}`, ec), false)
		if err != nil {
			return "", err
		}
		return string(answerOf(t, out).KeyWrapResults.Annotation), nil
	}
	const coco = wireformat.CoCoProvider
	both := map[string]string{"pilot": "team-a", coco: "team-a"}
	for _, test := range []struct {
		names  []string
		params map[string]string
		want   string // in the annotation, or in the error
	}{
		{nil, both, `"kekId":"team-a"`},
		{[]string{"pilot"}, both, `"kekId":"team-a"`},
		{[]string{coco}, both, `"kid":"kbs+external:///copilot/team-a/1"`},
		{[]string{"pilot", coco}, map[string]string{"pilot": "team-a"}, `"kekId":"team-a"`},
		{[]string{"pilot", coco}, map[string]string{coco: "team-a"}, `"kid":"kbs+external:///copilot/team-a/1"`},
		{[]string{"pilot", coco}, both, "a request does not say which of the two is called"},
		{nil, map[string]string{coco: "team-a"}, `add "attestation-agent" to provider-name`},
	} {
		got, err := wrap(test.names, test.params)
		if err != nil {
			got = err.Error()
		}
		if !strings.Contains(got, test.want) {
			t.Errorf("%v, for %v: %s, want %s", test.names, test.params, got, test.want)
		}
	}
}

// FuzzParseCoCoPacket checks that what is read names a KEK in one way, and that it is never
// taken for pilot's own annotation.
func FuzzParseCoCoPacket(f *testing.F) {
	b, err := os.ReadFile("testdata/coco-annotations.jsonl")
	if err != nil {
		f.Fatal(err)
	}
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
		var v struct{ Annotation []byte }
		if err := json.Unmarshal(lines.Bytes(), &v); err != nil {
			f.Fatal(err)
		}
		f.Add(v.Annotation)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		packet, err := wireformat.ParseCoCoPacket(b)
		if err != nil {
			return
		}
		if again, err := wireformat.CanonicalKID(packet.KID); err != nil || again != packet.KID {
			t.Errorf("%q becomes %q, %v", packet.KID, again, err)
		}
		if kek, version, ok := wireformat.ParsePluginKID(packet.KID); ok {
			if kid, err := wireformat.PluginKID(kek, version); err != nil || kid != packet.KID {
				t.Errorf("%q names version %d of %q, which is %q, %v", packet.KID, version, kek, kid, err)
			}
		}
		if _, err := wireformat.ParseAnnotation(b); err == nil {
			t.Errorf("%s is read as pilot's own", b)
		}
	})
}

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
