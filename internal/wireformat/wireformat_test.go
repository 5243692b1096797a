package wireformat

import (
	"encoding/json"
	"net/url"
	"strings"
	"testing"
)

func TestAdditionalDataIsCanonical(t *testing.T) {
	a := Annotation{Method: MethodA256GCMKW, KEKID: `a"\/é`, KEKVersion: 12}
	if got, want := string(a.AdditionalData()), `{"kekId":"a\"\\/é","kekVersion":12,"method":"A256GCMKW"}`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestParseAnnotationErrors(t *testing.T) {
	iv12, iv16, key := "AAAAAAAAAAAAAAAA", "AAAAAAAAAAAAAAAAAAAAAA==", "AAAAAAAAAAAAAAAAAAAAAAAAAAA="
	enc := strings.Repeat("AAAA", EncSize/3) + "AA=="
	for _, test := range []struct{ in, want string }{
		{``, "not pilot's"},
		{`null`, "no method"},
		{`"x"`, "not pilot's"},
		{`[]`, "0 recipients"},
		{`{}`, "no method"},
		{`{"method":"ROT13"}`, `method "ROT13" is not known`},
		{`{"method":"AES-GCM","iv":"` + iv12 + `","wrappedKey":"` + key + `"}`, "IV of 12 bytes, not 16"},
		{`{"method":"AES-GCM","iv":"` + iv16 + `","wrappedKey":"AAAA"}`, "too short"},
		{`{"method":"AES-GCM","kekId":"x","iv":"` + iv16 + `","wrappedKey":"` + key + `"}`, "does not name a KEK"},
		{`{"method":"A256GCMKW","iv":"` + iv12 + `","wrappedKey":"` + key + `"}`, "no KEK is named"},
		{`{"method":"A256GCMKW","kekId":"a b","iv":"` + iv12 + `","wrappedKey":"` + key + `"}`, "not allowed"},
		{`{"method":"A256GCMKW","kekId":"a","kekVersion":-1,"iv":"` + iv12 + `","wrappedKey":"` + key + `"}`, "negative"},
		{`{"method":"A256GCMKW","kekId":"a","iv":"` + iv16 + `","wrappedKey":"` + key + `"}`, "IV of 16 bytes, not 12"},
		{`{"method":"A256GCMKW","kekId":"a","iv":"` + iv12 + `","wrappedKey":"` + key + `","more":1}`, "more"},
		{`{"method":"A256GCMKW","kekId":"a","iv":"` + iv12 + `","wrappedKey":"` + key + `"} {}`, "follows"},
		{`{"method":"copilot","kekId":"a","kekVersion":1,"iv":"` + iv12 + `","wrappedKey":"` + key + `"}`, "method copilot has no IV"},
		{`{"method":"copilot","kekId":"a","kekVersion":1,"iv":"","wrappedKey":"` + key + `"}`, "method copilot has no IV"},
		{`{"method":"copilot","kekVersion":1,"wrappedKey":"` + key + `"}`, "no KEK is named"},
		{`{"method":"copilot","kekId":"a b","kekVersion":1,"wrappedKey":"` + key + `"}`, "not allowed"},
		{`{"method":"copilot","kekId":"a","wrappedKey":"` + key + `"}`, "version 0 is not from 1"},
		{`{"method":"copilot","kekId":"a","kekVersion":1}`, "wrapped key of 0 bytes"},
		{`{"method":"copilot","kekId":"a","kekVersion":1,"wrappedKey":"` + strings.Repeat("AAAA", 92160/3+1) + `"}`, "not 1 to 92160"},
		{`{"method":"A256GCMKW","kekId":"a","wrappedKey":"` + key + `"}`, "IV of 0 bytes"},
		{`{"method":"A256GCMKW","kekId":"a","iv":"` + iv12 + `","enc":"AAAA","wrappedKey":"` + key + `"}`, "no encapsulated key"},
		{`{"method":"A256GCMKW","kekId":"a","iv":"` + iv12 + `","recipient":"age1x","wrappedKey":"` + key + `"}`, "no recipient"},
		{`{"method":"` + MethodHPKE + `","kekId":"a","kekVersion":1,"wrappedKey":"` + key + `"}`, "encapsulated key of 0 bytes, not 1120"},
		{`{"method":"` + MethodHPKE + `","kekId":"a","enc":"` + enc + `","wrappedKey":"` + key + `"}`, "version 0 is not from 1"},
		{`{"method":"` + MethodHPKE + `","kekVersion":1,"enc":"` + enc + `","wrappedKey":"` + key + `"}`, "no KEK is named"},
		{`{"method":"` + MethodHPKE + `","kekId":"a","kekVersion":1,"enc":"` + enc + `","wrappedKey":"AAAA"}`, "wrapped key of 3 bytes"},
		{`{"method":"` + MethodHPKE + `","kekId":"a","kekVersion":1,"enc":"` + enc + `","iv":"` + iv12 + `","wrappedKey":"` + key + `"}`, "has no IV"},
		{`{"method":"HPKE-MLKEM1024-P384","kekId":"a","kekVersion":1,"wrappedKey":"` + key + `"}`, "not known to this version of pilot"},
		{`{"method":"age","wrappedKey":"` + key + `"}`, "is not a recipient of age"},
		{`{"method":"age","kekId":"a","recipient":"age1x","wrappedKey":"` + key + `"}`, "does not name a KEK"},
		{`{"method":"age","recipient":"age1 x","wrappedKey":"` + key + `"}`, "not allowed"},
		{`{"method":"age","recipient":"age1x"}`, "wrapped key of 0 bytes"},
		{`{"method":"age","recipient":"age1x","wrappedKey":"` + strings.Repeat("AAAA", MaxAge/3+1) + `"}`, "not 1 to 16384"},
		{`{"method":"A256GCMKW","kekId":"` + strings.Repeat("a", 2049) + `"}`, "longer than 2048"},
		{strings.Repeat(" ", MaxAnnotation+1), "more than 1048576 bytes"},
	} {
		_, err := ParseAnnotation([]byte(test.in))
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%.80s: %v, want %q", test.in, err, test.want)
		}
	}
}

// FuzzValidateKEKID checks that a KEK's name stays one part of a URL's path, and
// the same in JSON.
func FuzzValidateKEKID(f *testing.F) {
	for _, id := range []string{"team-a", "a/b", "../x", "a b", "a%2fb", "é", "a?b#c", "<a>"} {
		f.Add(id)
	}
	f.Fuzz(func(t *testing.T, id string) {
		if ValidateKEKID(id) != nil {
			return
		}
		u, err := url.Parse("http://copilot/api/v2/keks/" + url.PathEscape(id) + "/key")
		if err != nil || u.Path != "/api/v2/keks/"+id+"/key" || u.RawQuery != "" || u.Fragment != "" || strings.Contains(u.Path, "/../") {
			t.Errorf("%q becomes %v, %v", id, u, err)
		}
		a := Annotation{Method: MethodA256GCMKW, KEKID: id, KEKVersion: 1}
		if b := a.AdditionalData(); strings.Contains(string(b), `\u`) || !json.Valid(b) {
			t.Errorf("%q becomes %s", id, b)
		}
	})
}
