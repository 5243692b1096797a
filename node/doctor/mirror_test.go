package doctor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/node/containerd"
)

// TestDoctorNamesHostsFileThatCRIDoesNotRead examines containerds with a hosts.toml in the
// directory that newer ones read by themselves.
func TestDoctorNamesHostsFileThatCRIDoesNotRead(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "registry.test", "hosts.toml")
	err := os.Mkdir(filepath.Dir(file), 0o700)
	if err == nil {
		err = os.WriteFile(file, []byte("server = 'https://127.0.0.1:5443'\n[host.'https://127.0.0.1:5443']\n"), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func(dirs []string) { containerd.CertsDirs = dirs }(containerd.CertsDirs)
	containerd.CertsDirs = []string{dir}
	for _, test := range []struct {
		major, minor int
		plugin       string
		registry     map[string]any
		result       Result
		detail       string
	}{
		{1, 7, containerd.CRIV1, map[string]any{"config_path": ""}, Warning, file + " leads to it, and containerd's CRI does not read that"},
		{1, 7, containerd.CRIV1, map[string]any{"config_path": dir}, "", "containerd goes there by " + file},
		{2, 0, containerd.CRIImages, map[string]any{"config_path": ""}, Warning, "does not read that"},
		{2, 4, containerd.CRIImages, map[string]any{"config_path": ""}, "", "containerd goes there by " + file},
		{2, 4, containerd.CRIImages, map[string]any{"mirrors": map[string]any{"registry.test": nil}}, Warning, "does not read that"},
		{2, 4, containerd.CRIImages, map[string]any{"config_path": "/nowhere"}, "", "no hosts.toml of containerd leads to it"},
	} {
		e := &examination{
			Doctor:  &Doctor{Mirror: Mirror{Listen: "127.0.0.1:5443"}},
			running: &containerd.Instance{Major: test.major, Minor: test.minor},
			dump:    map[string]any{"plugins": map[string]any{test.plugin: map[string]any{"registry": test.registry}}},
		}
		if s := e.mirrorInContainerd(t.Context()); s.Result != test.result || !strings.Contains(s.Detail, test.detail) {
			t.Errorf("containerd %d.%d, %v: %+v", test.major, test.minor, test.registry, s)
		}
	}
}
