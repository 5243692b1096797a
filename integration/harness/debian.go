package harness

import (
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// Debian is a root of Debian 13, with skopeo, buildah and podman that know the
// key provider protocol. Commands in it see dir at its own path.
type Debian struct {
	T        testing.TB
	Root     string
	Ocicrypt string
}

func NewDebian(t testing.TB, dir, ocicrypt string) *Debian {
	t.Helper()
	m := NewMachine(t, filepath.Join(Tools, "trixie"))
	m.Mount(dir, dir, "", syscall.MS_BIND, "")
	m.Mount(Bin, Bin, "", syscall.MS_BIND, "")
	root := m.Root
	Write(t, filepath.Join(root, "etc/containers/policy.json"), `{"default": [{"type": "insecureAcceptAnything"}]}`)
	Write(t, filepath.Join(root, "etc/containers/storage.conf"), "[storage]\ndriver = \"vfs\"\nrunroot = \"/run/containers\"\ngraphroot = \"/var/lib/containers\"\n")
	return &Debian{t, root, ocicrypt}
}

func (d *Debian) Run(name string, args ...string) *exec.Cmd {
	d.T.Helper()
	cmd := Command(d.T, "chroot", append([]string{d.Root, name}, args...)...)
	cmd.Env = []string{"PATH=" + Bin + ":/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "OCICRYPT_KEYPROVIDER_CONFIG=" + d.Ocicrypt}
	return cmd
}
