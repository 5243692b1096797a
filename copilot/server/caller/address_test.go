package caller

import (
	"net/http"
	"testing"
)

func TestNetworkCountsAllAddressesOfOneMachineAsOne(t *testing.T) {
	for from, want := range map[string]string{
		"192.0.2.7:443":          "from 192.0.2.7",
		"[2001:db8:1:2::3]:443":  "from 2001:db8:1:2::/64",
		"[2001:db8:1:2:3::4]:44": "from 2001:db8:1:2::/64",
		"[fe80::1%eth0]:443":     "from fe80::/64",
		"[::ffff:192.0.2.7]:443": "from ::ffff:192.0.2.7",
		"[::1]:443":              "from ::1",
		"@":                      "from @",
	} {
		if got := Network(from); got != want {
			t.Errorf("%s: %q", from, got)
		}
	}
}

func TestSourceOfARequestIsItsNetwork(t *testing.T) {
	source := func(from string) string { return Source(&http.Request{RemoteAddr: from}) }
	if a, b := source("[2001:db8:1:2::3]:443"), source("[2001:db8:1:2:ffff::1]:80"); a != b {
		t.Errorf("%q and %q are limited separately", a, b)
	}
	if a, b := source("[2001:db8:1:2::3]:443"), source("[2001:db8:1:3::3]:443"); a == b {
		t.Errorf("two networks are limited as one, %q", a)
	}
}
