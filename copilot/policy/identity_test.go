package policy

import (
	"strings"
	"testing"
	"time"
)

func TestCanonical(t *testing.T) {
	issuers := []string{"cluster"}
	for in, want := range map[string]string{
		"spiffe://example.com/node/worker-7": "spiffe://example.com/node/worker-7",
		"dns:CI.Example.com.":                "dns:ci.example.com",
		"cn:Some Name":                       "cn:Some Name",
		"uid:007":                            "uid:7",
		"cluster:system:serviceaccount:a:b":  "cluster:system:serviceaccount:a:b",
		"anonymous":                          "anonymous",
	} {
		if got, err := Canonical(in, issuers); err != nil || got != want {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
	for in, want := range map[string]string{
		"worker-7":                         "is not an identity",
		"":                                 "is not an identity",
		"dns:":                             "is not an identity",
		"node/worker-7":                    "is not an identity",
		"SPIFFE://example.com/node/a":      "no issuer \"SPIFFE\": identities are",
		"spiffe://Example.com/node/a":      "SPIFFE ID",
		"spiffe://example.com":             "no path",
		"spiffe://example.com/node/../a":   "SPIFFE ID",
		"spiffe://example.com/node//a":     "SPIFFE ID",
		"spiffe://example.com/node/a?x=1":  "SPIFFE ID",
		"spiffe://example.com/node/a#x":    "SPIFFE ID",
		"spiffe://example.com/node/%61":    "SPIFFE ID",
		"spiffe://example.com:8443/node/a": "SPIFFE ID",
		"spiffe:/example.com/node/a":       "SPIFFE ID",
		"dns:*.example.com":                "not a host name",
		"dns:.":                            "not a host name",
		"dns:a..":                          "not a host name",
		"dns:a..example.com":               "not a host name",
		"dns:.example.com":                 "not a host name",
		"uid:root":                         "not a user's number",
		"uid:-1":                           "not a user's number",
		"other:subject":                    "no issuer \"other\" (a token's needs [issuers.other] in copilot.toml)",
	} {
		if got, err := Canonical(in, issuers); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
	if _, err := Canonical("other:subject", nil); err != nil {
		t.Errorf("issuers are not known: %v", err)
	}
}

func TestPatternsMatchSomebody(t *testing.T) {
	issuers := Issuers{"cluster": "https://kubernetes.default.svc"}
	rule := func(identity string) error {
		_, err := parse("p", []byte("[[rule]]\nidentities = ['"+identity+"']\nkeks = ['**']\nactions = ['unwrap']\n"), issuers)
		return err
	}
	for _, identity := range []string{
		"*", "**", "spiffe://**", "spiffe://example.com/node/*", "spiffe://*/node/a", "spiffe*", "dns:*.example.com", "dns:CI.*", "cn:*", "uid:*", "cluster:*", "cl*", "anonymous",
	} {
		if err := rule(identity); err != nil {
			t.Errorf("%q: %v", identity, err)
		}
	}
	for identity, want := range map[string]string{
		"worker-7":                    "is not an identity",
		"other:*":                     "no issuer",
		"spiffe://Example.com/node/*": "trust domains are in lower case",
		"spiffe:/*":                   "",
		"spiffe:x/*":                  "begins with spiffe://",
		"dns:*.example.com.":          "without the dot",
		"spiffe://example.com/%6e/*":  "percent-encoding",
	} {
		if err := rule(identity); want != "" && (err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "rule 1")) {
			t.Errorf("%q: %v", identity, err)
		}
	}
	p, err := parse("p", []byte("[[rule]]\nidentities = ['dns:CI.Example.com.', 'dns:*.EXAMPLE.org']\nkeks = ['**']\nactions = ['unwrap']\n"), issuers)
	if err != nil {
		t.Fatal(err)
	}
	for _, identity := range []string{"dns:ci.example.com", "dns:a.example.org"} {
		if !p.Usable(Principal{Identity: identity}, anyTime)("k") {
			t.Errorf("%s is not matched", identity)
		}
	}
}

var anyTime = time.Unix(1_800_000_000, 0)
