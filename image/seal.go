package image

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"maps"

	"github.com/ctrlplane/pilot/internal/jsonedit"
	"github.com/ctrlplane/pilot/processor"
)

// A plain layer may have annotations that another encryption left on it. Anyone who
// can write to the registry could put such annotations into [restore], and ocicrypt
// takes a layer that has them for one that is encrypted already. So they are sealed
// with the layer key, and put back only if the seal fits.

// newSealKey returns the key with which a layer's annotations are sealed.
func newSealKey(key *processor.LayerKey) []byte { return key.Derive("pilot image restore annotations") }

func sealOf(key, text []byte) []byte {
	h := hmac.New(sha256.New, key)
	h.Write(text)
	return h.Sum(nil)
}

// seal notes the text of the annotations that the layer at a place has, whatever
// was noted of them before.
func (r restore) seal(key []byte, at string, annotations []byte) {
	r[at+"/annotations"] = string(annotations)
	r[at+"/seal"] = base64.StdEncoding.EncodeToString(sealOf(key, annotations))
}

// unseal returns the descriptor of a decrypted layer with the annotations that it
// had, if they were sealed and differ only in those of another encryption.
func (r restore) unseal(key []byte, at string, element []byte) ([]byte, error) {
	text := []byte(r[at+"/annotations"])
	sum, err := base64.StdEncoding.DecodeString(r[at+"/seal"])
	if err != nil || len(key) == 0 || !hmac.Equal(sum, sealOf(key, text)) {
		return element, nil
	}
	has, err := jsonedit.Get(element, "annotations")
	if err != nil {
		return nil, err
	}
	var was, is map[string]string
	if has == nil || json.Unmarshal(text, &was) != nil || json.Unmarshal(has, &is) != nil {
		return element, nil
	}
	maps.DeleteFunc(was, func(name, _ string) bool { return ofEncryption(name) })
	if !maps.Equal(was, is) {
		return element, nil
	}
	return jsonedit.Set(element, "annotations", text)
}
