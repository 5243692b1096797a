package crio

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/host"
)

// TestCRIOPullsWhereContainerdIsGone has machines with crio.service, and what a containerd has
// left.
func TestCRIOPullsWhereContainerdIsGone(t *testing.T) {
	const unit, program = "usr/lib/systemd/system/containerd.service", "opt/containerd/bin/containerd"
	for name, test := range map[string]struct {
		files []string
		want  bool
	}{
		"none":                    {nil, true},
		"its configuration":       {[]string{"etc/containerd/config.toml"}, true},
		"its unit":                {[]string{"etc/containerd/config.toml", unit}, true},
		"its unit and program":    {[]string{unit, program}, false},
		"its program in the PATH": {[]string{"usr/bin/containerd"}, false},
	} {
		h := host.Host{Root: t.TempDir()}
		for _, file := range append(test.files, "usr/lib/systemd/system/crio.service") {
			if err := os.MkdirAll(filepath.Dir(filepath.Join(h.Root, file)), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(h.Root, file), []byte("[Service]\nExecStart=/"+program+"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if got := PullsImages(h, containerd.Named{}); got != test.want {
			t.Errorf("%s: %t", name, got)
		}
	}
}

// TestCRIOKeysDoNotBlock checks a decryption_keys_path with files that CRI-O would block
// on or read into memory.
func TestCRIOKeysDoNotBlock(t *testing.T) {
	for want, put := range map[string]func(name string) error{
		"a.pem: it is a pipe": func(name string) error { return syscall.Mkfifo(name, 0o600) },
		"a.pem: larger than 1024 KiB": func(name string) error {
			return os.WriteFile(name, make([]byte, maxKey+1), 0o600)
		},
	} {
		dir := t.TempDir()
		c := &Running{PID: os.Getpid(), KeysPath: dir}
		if keys, err := c.CheckKeys(); keys != 0 || err != nil {
			t.Errorf("an empty directory: %d, %v", keys, err)
		}
		if err := put(filepath.Join(dir, "a.pem")); err != nil {
			t.Fatal(err)
		}
		if _, err := c.CheckKeys(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q: %v", want, err)
		}
	}
}
