package install

import (
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
)

func TestInsertedImportIsLastAndRemovable(t *testing.T) {
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
		"imports = ['/a.toml', \"/b]'.toml\"] # ]\n",
		"imports = [\n '/a.toml', # one, ]\n '/b.toml' # two\n ]\n",
		"imports = [ # none yet\n]\n",
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
		if is.Version != was.Version || len(is.Imports) != len(was.Imports)+1 || is.Imports[len(was.Imports)] != file {
			t.Errorf("%q became %q", text, edited)
		}
		if back := strings.Replace(edited, inserted, "", 1); back != text {
			t.Errorf("%q became %q and that %q", text, edited, back)
		}
	}
}
