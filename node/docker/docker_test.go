package docker

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/node/host"
)

// dockerRoot makes the root directory of a machine with files. A name that ends
// in a slash is a directory.
func dockerRoot(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	put := func(name, content string, mode os.FileMode) {
		t.Helper()
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(name, "/") {
			return
		}
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
	}
	put("/usr/bin/containerd", "not run", 0o755)
	for name, content := range files {
		if name == "-/usr/bin/containerd" {
			if err := os.Remove(filepath.Join(root, "/usr/bin/containerd")); err != nil {
				t.Fatal(err)
			}
			continue
		}
		put(name, content, 0o644)
	}
	return root
}

const dockerUnit = "/usr/lib/systemd/system/docker.service"

// TestDockerAdvice examines root directories, one of each kind.
func TestDockerAdvice(t *testing.T) {
	const packaged = "[Service]\nExecStart=/usr/bin/dockerd -H fd:// --containerd=/run/containerd/containerd.sock\n"
	for _, test := range []struct {
		name, version string
		files         map[string]string
		detail        string
		fix           []string
	}{
		{"a fresh 29", "29.1.3", map[string]string{dockerUnit: packaged},
			"Docker 29.1.3 uses this containerd (namespace moby) with its containerd image store: encrypted images work", nil},
		{"29 upgraded", "29.1.3", map[string]string{dockerUnit: packaged, "/var/lib/docker/overlay2/l": ""},
			"graph-driver store (/var/lib/docker/overlay2 is not empty, so Docker 29 keeps using it)", []string{`"features": {"containerd-snapshotter": true} in /etc/docker/daemon.json`, "restart docker"}},
		{"29 with an empty directory of a graph driver", "29.1.3", map[string]string{"/var/lib/docker/overlay2/": ""}, "encrypted images work", nil},
		{"29 upgraded, elsewhere", "29.1.3", map[string]string{"/etc/docker/daemon.json": `{"data-root": "/srv/docker"}`, "/srv/docker/zfs/x": ""},
			"/srv/docker/zfs is not empty", []string{"features", "restart docker"}},
		{"29 upgraded and switched", "29.1.3", map[string]string{"/etc/docker/daemon.json": `{"features": {"containerd-snapshotter": true}}`, "/var/lib/docker/overlay2/l": ""}, "encrypted images work", nil},
		{"29 with a graph driver", "29.1.3", map[string]string{"/etc/docker/daemon.json": `{"storage-driver": "overlay2"}`},
			"storage-driver is overlay2", []string{`remove storage-driver "overlay2"`, "restart docker"}},
		{"29 with a snapshotter", "29.1.3", map[string]string{"/etc/docker/daemon.json": `{"storage-driver": "native"}`}, "encrypted images work", nil},
		{"28", "28.5.2", map[string]string{dockerUnit: packaged}, "the default before Docker 29", []string{"features", "restart docker"}},
		{"28 switched", "28.5.2", map[string]string{"/etc/docker/daemon.json": "\ufeff{\"features\": {\"containerd-snapshotter\": true}}\n"}, "encrypted images work", nil},
		{"28 switched by a flag", "28.5.2", map[string]string{dockerUnit: packaged,
			"/etc/systemd/system/docker.service.d/x.conf": "[Service]\nExecStart=\nExecStart=/usr/bin/dockerd \\\n  --feature containerd-snapshotter=true --containerd /run/containerd/containerd.sock\n"}, "encrypted images work", nil},
		{"29 switched back", "29.1.3", map[string]string{"/etc/docker/daemon.json": `{"features": {"containerd-snapshotter": false}}`}, "features.containerd-snapshotter is false", []string{"features", "restart docker"}},
		{"20.10", "20.10.24+dfsg1", nil, "has no containerd image store", []string{"upgrade Docker"}},
		{"a program that prints no version", "", nil, "unknown image store", []string{"docker info"}},
		{"another containerd", "29.1.3", map[string]string{"/etc/docker/daemon.json": `{"containerd": "unix:///run/k3s/containerd/containerd.sock"}`},
			"uses the containerd at /run/k3s/containerd/containerd.sock, and pilot serves the one at /run/containerd/containerd.sock", []string{`"containerd": "/run/containerd/containerd.sock"`, "restart docker"}},
		{"the same containerd by another path", "29.1.3", map[string]string{"/etc/docker/daemon.json": `{"containerd": "/var/run/containerd/containerd.sock"}`}, "encrypted images work", nil},
		{"no containerd", "29.1.3", map[string]string{"-/usr/bin/containerd": ""},
			"starts its own containerd at /var/run/docker/containerd/containerd.sock", []string{"install containerd", "enable --now containerd", "restart docker"}},
		{"containerd in dockerd", "29.1.3", map[string]string{dockerUnit: packaged, "/etc/docker/daemon.json": `{"features": {"embedded-containerd": true}, "exec-root": "/run/d"}`},
			"starts its own containerd at /run/d/containerd/containerd.sock", []string{"remove features.embedded-containerd", "enable", "restart docker"}},
		{"an empty configuration, elsewhere", "29.1.3", map[string]string{dockerUnit: "[Service]\nExecStart=/usr/bin/dockerd --config-file=/etc/d.json\n", "/etc/d.json": "\n"}, "encrypted images work", nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := host.Host{Root: dockerRoot(t, test.files)}
			d, _, err := examine(h, test.version, 0, unitArgs(h))
			if err != nil {
				t.Fatal(err)
			}
			detail, fix := d.Advice("/run/containerd/containerd.sock")
			if !strings.Contains(detail, test.detail) || len(fix) != len(test.fix) {
				t.Fatalf("%s: %q", detail, fix)
			}
			for i, want := range test.fix {
				if !strings.Contains(fix[i], want) {
					t.Errorf("want %q in %q", want, fix)
				}
			}
		})
	}
}

// TestNoDockerAndUnusableConfiguration examines machines without Docker, and with an unusable configuration.
func TestNoDockerAndUnusableConfiguration(t *testing.T) {
	if d, err := Find(t.Context(), host.Host{Root: dockerRoot(t, nil)}); d != nil || err != nil {
		t.Errorf("%+v, %v", d, err)
	}
	for name, files := range map[string]map[string]string{
		"not JSON":   {"/etc/docker/daemon.json": "features:\n"},
		"wrong type": {"/etc/docker/daemon.json": `{"features": {"containerd-snapshotter": "yes"}}`},
		"missing":    {dockerUnit: "[Service]\nExecStart=/usr/bin/dockerd --config-file /etc/docker/daemon.json\n"},
	} {
		h := host.Host{Root: dockerRoot(t, files)}
		if _, _, err := examine(h, "29.1.3", 0, unitArgs(h)); err == nil || !strings.Contains(err.Error(), "/etc/docker/daemon.json") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
