package wireformat

import (
	"encoding/json"
	"reflect"
	"testing"
)

// FuzzParseQuick compares parseQuick and [AdditionalData] with encoding/json, which reads
// what parseQuick does not.
func FuzzParseQuick(f *testing.F) {
	const text = `{"method":"A256GCMKW","kekId":"team-a","kekVersion":12,"iv":"AAECAwQFBgcICQoL","wrappedKey":"AAAAAAAAAAAAAAAAAAAAAAAAAAA="}`
	if _, ok := parseQuick([]byte(text)); !ok {
		f.Error("what encoding/json writes is not read")
	}
	f.Add([]byte(text), "team-a", 12)
	f.Add([]byte(`{"method":"A256GCMKW","kekId":"a\u0062","kekVersion":1,"iv":"AA==","wrappedKey":"AA=="}`), `a"b`, 0)
	f.Add([]byte(`{"method":"A256GCMKW","kekId":"a","kekVersion":01,"iv":"AA==","wrappedKey":"AA=="}`), `a\b`, -1)
	f.Add([]byte(`{"method":"A256GCMKW","kekId":"a","kekVersion":1,"iv":"AA=`+"\n"+`=","wrappedKey":"AA=="}`), "é<&>", 1)
	f.Add([]byte(`{"method":"A256GCMKW","kekId":"a","kekVersion":1,"iv":"AA==","wrappedKey":"AA=="} `), "\xff\u2028", 1)
	f.Fuzz(func(t *testing.T, b []byte, id string, version int) {
		if a, ok := parseQuick(b); ok {
			var want Annotation
			if err := decodeStrict(b, &want); err != nil || !reflect.DeepEqual(a, want) {
				t.Errorf("%q is read as %+v, and not as %+v, %v", b, a, want, err)
			}
		}
		a := Annotation{Method: MethodA256GCMKW, KEKID: id, KEKVersion: version, IV: []byte{1}, WrappedKey: []byte{1}}
		written, err := json.Marshal(a)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := parseQuick(written); ok != (id != "" && version != 0 && isVerbatim(id)) {
			t.Errorf("%q is read: %v", written, ok)
		}
		want, err := json.Marshal(map[string]any{"method": string(b), "kekId": id, "kekVersion": version})
		if err != nil {
			t.Fatal(err)
		}
		if got := AdditionalData(string(b), id, version); string(got) != string(want) {
			t.Errorf("additional data %q, and not %q", got, want)
		}
	})
}
