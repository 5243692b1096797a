package caller

import "testing"

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
