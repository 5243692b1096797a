package jwks

import "testing"

func TestWithoutCertificates(t *testing.T) {
	for in, want := range map[string]string{
		`{"keys":[{"kid":"1","n":"AQ","x5c":["MIIB"],"x5t":"a","x5t#S256":"b","x5u":"c"},{"kid":"2"}],"more":1}`: `{"keys":[{"kid":"1","n":"AQ"},{"kid":"2"}],"more":1}`,
		`{"Keys":[{"x5c":["MIIB"]}]}`:         `{"Keys":[{}]}`,
		`{"keys":[]}`:                         `{"keys":[]}`,
		`{"issuer":"https://id.example.com"}`: `{"issuer":"https://id.example.com"}`,
		`{"keys":[{"x5c":["MIIB"]},2,null]}`:  `{"keys":[{},2,null]}`, // which go-jose refuses at the 2
		`no JSON`:                             `no JSON`,
	} {
		if got := string(WithoutCertificates([]byte(in))); got != want {
			t.Errorf("%s\nbecomes %s", in, got)
		}
	}
}
