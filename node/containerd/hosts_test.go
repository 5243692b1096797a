package containerd

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/pelletier/go-toml/v2"

	"github.com/ctrlplane/pilot/node/host"
)

// TestHostsDirIsTakenWhereItIsCertain has configurations and files of containerd.
func TestHostsDirIsTakenWhereItIsCertain(t *testing.T) {
	const (
		cri      = "[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/etc/containerd/certs.d'\n"
		unset    = "[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'overlayfs'\n"
		both     = "[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/etc/containerd/certs.d:/etc/docker/certs.d'\n"
		transfer = "[plugins.'io.containerd.transfer.v1.local']\nconfig_path = '/etc/containerd/certs.d'\n"
		file     = "/etc/containerd/certs.d/registry.example.com/hosts.toml"
		mirror   = "server = 'https://registry.example.com'\n[host.'https://mirror.example.com']\n"
	)
	v1 := "[plugins.'io.containerd.grpc.v1.cri'.registry]\nconfig_path = '/etc/containerd/certs.d'\n"
	for name, test := range map[string]struct {
		major, minor int
		config       string
		files        map[string]string
		certain      bool
	}{
		"a mirror":                       {2, 0, cri, map[string]string{file: mirror}, true},
		"containerd 1.7":                 {1, 7, v1, map[string]string{file: mirror}, true},
		"a CA":                           {2, 0, cri, map[string]string{"/etc/containerd/certs.d/registry.example.com/ca.crt": ""}, true},
		"a mirror of all registries":     {2, 0, cri, map[string]string{"/etc/containerd/certs.d/_default/hosts.toml": "[host.'mirror.example.com']\n"}, true},
		"a server of all registries":     {2, 0, cri, map[string]string{"/etc/containerd/certs.d/_default/hosts.toml": "server = 'mirror.example.com'\n"}, false},
		"no files":                       {2, 0, cri, nil, false},
		"the default, before 2.2":        {2, 1, unset, map[string]string{file: mirror}, false},
		"the default":                    {2, 2, unset, map[string]string{file: mirror}, true},
		"the default, with mirrors":      {2, 2, unset + "[plugins.'io.containerd.cri.v1.images'.registry.mirrors.'docker.io']\n", map[string]string{file: mirror}, false},
		"two directories, one with some": {2, 2, both, map[string]string{file: mirror}, true},
		"two directories":                {2, 2, both, map[string]string{file: mirror, "/etc/docker/certs.d/registry.example.com/ca.crt": ""}, false},
		"not for the kubelet's images":   {2, 0, unset + transfer, map[string]string{file: mirror}, false},
		"without a kubelet":              {2, 0, transfer, map[string]string{file: mirror}, true},
		"pilot's mirror":                 {2, 0, cri, map[string]string{file: "server = 'https://127.0.0.1:5443'\n[host.'https://127.0.0.1:5443']\n"}, false},
		"pilot's mirror among others":    {2, 0, cri, map[string]string{file: mirror + "[host.'localhost:5000']\n"}, false},
		"a file that can't be read":      {2, 0, cri, map[string]string{file: mirror, "/etc/containerd/certs.d/other.example.com/hosts.toml": "server = "}, false},
	} {
		h := host.Host{Root: t.TempDir()}
		for path, text := range test.files {
			if err := os.MkdirAll(filepath.Join(h.Root, filepath.Dir(path)), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(h.Root, path), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		c := Instance{Major: test.major, Minor: test.minor}
		if err := toml.Unmarshal([]byte(test.config), &c.Plain); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		want := ""
		if test.certain {
			want = "/etc/containerd/certs.d"
		}
		if got := c.HostsDir(h); got != want {
			t.Errorf("%s: %q", name, got)
		}
	}
}
