package authorization

import "testing"

// TestRevocationMatchesOtherSpellings compares revocations of earlier versions, which were
// not canonical.
func TestRevocationMatchesOtherSpellings(t *testing.T) {
	revoked := []string{"dns:CI.example.com.", "uid:007", "cluster:system:serviceaccount:a:b", "x"}
	for identity, want := range map[string]bool{
		"dns:ci.example.com": true, "uid:7": true, "cluster:system:serviceaccount:a:b": true, "dns:example.com": false, "uid:70": false, "anonymous": false,
	} {
		if (Revocation(revoked, identity) != "") != want {
			t.Errorf("%s: %v", identity, !want)
		}
	}
}

func TestRevocationOfAServiceAccountIsForAllNodes(t *testing.T) {
	const account = "cluster:system:serviceaccount:a:b"
	for revoked, want := range map[string][]bool{
		account:                {true, true, true},
		account + "@node/w-1":  {false, true, false},
		account + "@node/w-10": {false, false, false},
	} {
		for i, identity := range []string{account, account + "@node/w-1", account + "@node/w-2"} {
			if got := Revocation([]string{revoked}, identity); (got == revoked) != want[i] || got != "" && got != revoked {
				t.Errorf("%s revoked: %s: %q", revoked, identity, got)
			}
		}
	}
}
