package node

import (
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
)

func TestInsertImport(t *testing.T) {
	const file = "/etc/containerd/conf.d/pilot.toml"
	for _, text := range []string{
		"",
		"version = 2\n",
		"version = 3",
		"# comment\nversion = 2\n\n[plugins]\n",
		"root = '/x'\nversion = 2\n[plugins]\n  imports = ['no']\n",
		"imports = ['/a.toml']\nversion = 2\n",
		"version = 2\nimports=[\n  '/a.toml',\n]\n[grpc]\n",
		"version = 2\nimports = []\n",
		"  imports = [ ] # none\n[grpc]\nversion = 2\n",
	} {
		edited, inserted := insertImport(text, file)
		var was, is struct {
			Version int      `toml:"version"`
			Imports []string `toml:"imports"`
		}
		toml.Unmarshal([]byte(text), &was)
		if err := toml.Unmarshal([]byte(edited), &is); err != nil {
			t.Errorf("%q became %q: %v", text, edited, err)
			continue
		}
		if is.Version != was.Version || len(is.Imports) != len(was.Imports)+1 || is.Imports[0] != file {
			t.Errorf("%q became %q", text, edited)
		}
		if back := strings.Replace(edited, inserted, "", 1); back != text {
			t.Errorf("%q became %q and that %q", text, edited, back)
		}
	}
}

func TestParseVersion(t *testing.T) {
	for text, want := range map[string][2]int{
		"containerd github.com/containerd/containerd/v2 v2.4.2 193637f7":                {2, 4},
		"containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6+deb13u1":   {1, 7},
		"containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u1":   {1, 6},
		"containerd containerd.io v2.1.0-rc.0 061792f0ecf3684fb30a3a0eb006799b8c6638a7": {2, 1},
		"containerd github.com/containerd/containerd/v2 v2.4.2+unknown ":                {2, 4},
	} {
		major, minor, err := parseVersion(text)
		if err != nil || major != want[0] || minor != want[1] {
			t.Errorf("%q: %d.%d, %v", text, major, minor, err)
		}
	}
	if _, _, err := parseVersion("hello"); err == nil {
		t.Error("hello is a version")
	}
}
