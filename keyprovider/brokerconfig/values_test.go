package brokerconfig

import (
	"reflect"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/keyprovider"
)

func TestKBSKEKs(t *testing.T) {
	var list KBSKEKs
	const text = "kbs:///default/key/a=team-a,/default/key/b=a/b@2,kbs://kbs.example.com:8080/default/key/c=eyJ9==,kbs+pkcs11:///x/y/z=who@example.com"
	if err := list.UnmarshalText([]byte(text)); err != nil || list.String() != text {
		t.Fatalf("%q, %v", list.String(), err)
	}
	want := map[string]keyprovider.KBSKEK{
		"kbs:///default/key/a":                     {ID: "team-a", Version: 1},
		"kbs:///default/key/b":                     {ID: "a/b", Version: 2},
		"kbs://kbs.example.com:8080/default/key/c": {ID: "eyJ9==", Version: 1},
		"kbs+pkcs11:///x/y/z":                      {ID: "who@example.com", Version: 1},
	}
	if got := list.byURI(); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
	for text, want := range map[string]string{
		"team-a":                           "is not the URI of a KBS resource",
		"kbs:///default/key=team-a":        "is not the URI of a KBS resource",
		"kbs:///default/key/a?version=2=x": "is not the URI of a KBS resource",
		"kbs:///default/key/a":             "no KEK is named",
		"kbs:///default/key/a=":            "no KEK is named",
		"kbs:///a/b/c=x,/a/b/c=y":          "duplicate URI kbs:///a/b/c",
		"kbs+external:///copilot/a/1=b":    "says itself which KEK",
	} {
		if err := new(KBSKEKs).UnmarshalText([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}
