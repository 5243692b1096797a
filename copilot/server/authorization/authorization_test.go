package authorization

import "testing"

// TestRevocationMatchesOtherSpellings compares revocations of earlier versions, which were
// not canonical.
func TestRevocationMatchesOtherSpellings(t *testing.T) {
	revoked := []string{"dns:CI.example.com.", "uid:007", "cluster:system:serviceaccount:a:b", "x"}
	for identity, want := range map[string]bool{
		"dns:ci.example.com": true, "uid:7": true, "cluster:system:serviceaccount:a:b": true, "dns:example.com": false, "uid:70": false, "anonymous": false,
	} {
		if IsRevoked(revoked, identity) != want {
			t.Errorf("%s: %v", identity, !want)
		}
	}
}
