package processor

import (
	"maps"
	"slices"
	"testing"
)

// TestPKCS11RequestHasNoOtherKeys checks what a module's process is sent.
func TestPKCS11RequestHasNoOtherKeys(t *testing.T) {
	params := map[string][][]byte{
		"privkeys": {[]byte("key")}, "privkeys-passwords": {[]byte("password")}, "gpg-privatekeys": {[]byte("gpg")}, "pilot": {[]byte("kek")},
		"pkcs11-yamls": {[]byte("yaml")}, "pkcs11-config": {[]byte("config")},
	}
	r := newPKCS11Request(params, []byte("wrapped"))
	if names := slices.Sorted(maps.Keys(r.Keys)); !slices.Equal(names, []string{"pkcs11-config", "pkcs11-yamls"}) || string(r.Keys["pkcs11-yamls"][0]) != "yaml" || string(r.Wrapped) != "wrapped" {
		t.Errorf("%+v", r)
	}
	if r := newPKCS11Request(nil, nil); len(r.Keys) != 0 {
		t.Errorf("%+v", r)
	}
}
