package containerd

import "testing"

func TestVersionsOfAllPackagesAreRead(t *testing.T) {
	for text, want := range map[string][2]int{
		"containerd github.com/containerd/containerd/v2 v2.4.2 193637f7":                {2, 4},
		"containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6+deb13u1":   {1, 7},
		"containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u1":   {1, 6},
		"containerd containerd.io v2.1.0-rc.0 061792f0ecf3684fb30a3a0eb006799b8c6638a7": {2, 1},
		"containerd github.com/containerd/containerd/v2 v2.4.2+unknown ":                {2, 4},
	} {
		major, minor, err := ParseVersion(text)
		if err != nil || major != want[0] || minor != want[1] {
			t.Errorf("%q: %d.%d, %v", text, major, minor, err)
		}
	}
	if _, _, err := ParseVersion("hello"); err == nil {
		t.Error("hello is a version")
	}
}
