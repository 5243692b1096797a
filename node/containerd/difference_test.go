package containerd

import (
	"testing"

	"github.com/pelletier/go-toml/v2"
)

func TestDifferencesLeaveOutPilotsSettings(t *testing.T) {
	const was = `
imports = ["/a.toml"]
oom_score = 1
[plugins."io.containerd.service.v1.diff-service"]
  default = ["walking"]
  sync_fs = false
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "pause:3.10"
[proxy_plugins]
`
	for name, test := range map[string]struct{ would, want string }{
		"same": {was, ""},
		"pilot": {`
imports = ["/a.toml", "/pilot.toml"]
oom_score = 1
[plugins."io.containerd.service.v1.diff-service"]
  default = ["pilot", "walking"]
  sync_fs = false
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "pause:3.10"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  differ = "pilot"
[proxy_plugins.pilot]
  type = "diff"
`, ""},
		"more": {`
[plugins."io.containerd.service.v1.diff-service"]
  sync_fs = true
[proxy_plugins.other]
  type = "diff"
`, `oom_score (unset, not 1); plugins."io.containerd.cri.v1.images".pinned_images.sandbox (unset, not "pause:3.10"); ` +
			`plugins."io.containerd.service.v1.diff-service".sync_fs (true, not false); proxy_plugins.other.type ("diff", not unset)`},
	} {
		if got := Summary(Differences(parse(t, was), parse(t, test.would), setByDiffer)); got != test.want {
			t.Errorf("%s: %s", name, got)
		}
	}
}

func TestSummaryOfDifferencesIsBounded(t *testing.T) {
	many := Differences(parse(t, "a=1\nb=1\nc=1\nd=1\ne=1\nf=1\ng=1\n"), nil, setByDecoder)
	if got := Summary(many); got != "a (unset, not 1); b (unset, not 1); c (unset, not 1); d (unset, not 1); e (unset, not 1); and 2 more" {
		t.Error(got)
	}
}

func parse(t *testing.T, text string) map[string]any {
	t.Helper()
	var conf map[string]any
	if err := toml.Unmarshal([]byte(text), &conf); err != nil {
		t.Fatal(err)
	}
	return conf
}
