package containerd

import "testing"

func TestVersionsOfAllPackagesAreRead(t *testing.T) {
	for text, want := range map[string][3]int{
		"containerd github.com/containerd/containerd/v2 v2.4.2 193637f7":                {2, 4, 2},
		"containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6+deb13u1":   {1, 7, 24},
		"containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u1":   {1, 6, 20},
		"containerd containerd.io v2.1.0-rc.0 061792f0ecf3684fb30a3a0eb006799b8c6638a7": {2, 1, 0},
		"containerd github.com/containerd/containerd/v2 v2.4.2+unknown ":                {2, 4, 2},
		"containerd github.com/containerd/containerd 1.7.x ":                            {1, 7, -1},
	} {
		major, minor, patch, err := ParseVersion(text)
		if got := [3]int{major, minor, patch}; err != nil || got != want {
			t.Errorf("%q: %d, %v", text, got, err)
		}
	}
	if _, _, _, err := ParseVersion("hello"); err == nil {
		t.Error("hello is a version")
	}
}

// TestLazyPullingNeedsARootThatCRIReports has the versions before and after containerd's CRI
// takes over the root that a proxy plugin exports.
func TestLazyPullingNeedsARootThatCRIReports(t *testing.T) {
	for version, ok := range map[[3]int]bool{
		{1, 6, 32}: false, {1, 7, 0}: false, {1, 7, 15}: false, {1, 7, 16}: true, {1, 7, -1}: true, {2, 0, 0}: true, {2, 4, 2}: true,
	} {
		c := Instance{Major: version[0], Minor: version[1], Patch: version[2]}
		if err := c.CheckLazy(); (err == nil) != ok {
			t.Errorf("containerd %d: %v", version, err)
		}
	}
}
