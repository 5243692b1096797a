package integration

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// machine is the root of a machine of its own, in which its containerd and
// pilot run by chroot.
type machine struct {
	t    testing.TB
	root string
	lib  string // its /var/lib/containerd
}

// newMachine makes a machine on top of a root directory, with our programs.
func newMachine(t testing.TB, lower string) *machine {
	t.Helper()
	m := bareMachine(t, lower)
	for _, name := range []string{"pilot", "pilot-decoder", "ctr-pilot"} {
		m.copy(filepath.Join(bin, name))
	}
	m.copy(filepath.Join(tools, "bin/ctr"))
	return m
}

// bareMachine makes a machine that is as the root directory.
func bareMachine(t testing.TB, lower string) *machine {
	t.Helper()
	dir := tempDir(t)
	m := &machine{t, filepath.Join(dir, "root"), filepath.Join(dir, "lib")}
	for _, name := range []string{"upper", "work", "lib"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"etc", "usr/lib/systemd"} {
		m.freeze(lower, filepath.Join(dir, "upper"), name)
	}
	m.mount("overlay", "", "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", lower, dir, dir))
	m.mount("proc", "proc", "proc", 0, "")
	m.mount("/dev", "dev", "", syscall.MS_BIND|syscall.MS_REC, "")
	m.mount("/sys", "sys", "", syscall.MS_BIND|syscall.MS_REC, "")
	m.mount("tmpfs", "run", "tmpfs", 0, "")
	m.mount("tmpfs", "tmp", "tmpfs", 0, "")
	m.mount("tmpfs", "var/tmp", "tmpfs", 0, "")
	m.mount(m.lib, "var/lib/containerd", "", syscall.MS_BIND, "")
	return m
}

// freeze copies a directory whose files are compared, so that what others install
// on the machine that runs the tests does not show in them.
func (m *machine) freeze(lower, upper, name string) {
	m.t.Helper()
	target := filepath.Join(upper, name)
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		m.t.Fatal(err)
	}
	// Files that disappear meanwhile are no fault.
	exec.CommandContext(m.t.Context(), "cp", "-a", filepath.Join(lower, name), target).Run()
	if err := syscall.Setxattr(target, "trusted.overlay.opaque", []byte("y"), 0); err != nil {
		m.t.Fatalf("%s: %v", target, err)
	}
}

// mount mounts something on the machine until the end of the test.
func (m *machine) mount(source, target, kind string, flags uintptr, data string) {
	m.t.Helper()
	target = filepath.Join(m.root, target)
	if err := os.MkdirAll(target, 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := syscall.Mount(source, target, kind, flags, data); err != nil {
		m.t.Fatalf("mount %s: %v", target, err)
	}
	m.t.Cleanup(func() {
		if err := syscall.Unmount(target, syscall.MNT_DETACH); err != nil {
			m.t.Errorf("unmount %s: %v", target, err)
		}
	})
}

// copy puts a program into the machine's /usr/local/bin.
func (m *machine) copy(file string) {
	m.t.Helper()
	output(m.t, command(m.t, "install", "-D", file, filepath.Join(m.root, "usr/local/bin", filepath.Base(file))))
}

// start starts a program of the machine's.
func (m *machine) start(t testing.TB, name string, args ...string) *process {
	t.Helper()
	cmd := exec.Command("chroot", append([]string{m.root, name}, args...)...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}
	return start(t, filepath.Dir(m.root), filepath.Base(name), cmd)
}

// run returns a command on the machine.
func (m *machine) run(name string, args ...string) *exec.Cmd {
	m.t.Helper()
	cmd := command(m.t, "chroot", append([]string{m.root, name}, args...)...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}
	return cmd
}

// brokerAt puts a broker's socket at copilot's usual place on the machine.
func (m *machine) brokerAt(url string) {
	m.t.Helper()
	socket := m.root + "/run/copilot/copilot.sock"
	write(m.t, socket, "")
	if err := syscall.Mount(strings.TrimPrefix(url, "unix://"), socket, "", syscall.MS_BIND, ""); err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { syscall.Unmount(socket, syscall.MNT_DETACH) })
}

// up starts pilot and containerd as they are set up.
func (m *machine) up(t testing.TB) *node {
	t.Helper()
	m.start(t, "pilot", "serve")
	await(t, "pilot", answers(m.root+"/run/pilot/keyprovider.sock"))
	m.start(t, "containerd")
	n := &node{t: t, dir: filepath.Dir(m.root), socket: m.root + "/run/containerd/containerd.sock"}
	await(t, "containerd", func() error { return n.ctr("version").Run() })
	return n
}

// pilot returns a command of pilot's on the machine from outside.
func (m *machine) pilot(args ...string) *exec.Cmd {
	m.t.Helper()
	return command(m.t, "pilot", append(args, "--root", m.root)...)
}

// files returns the sums of the files below the machine's /etc and what
// else an installation writes.
func (m *machine) files() map[string]string {
	m.t.Helper()
	sums := map[string]string{}
	for _, dir := range []string{"etc", "var/lib/pilot", "usr/lib/systemd"} {
		err := filepath.WalkDir(filepath.Join(m.root, dir), func(path string, e fs.DirEntry, err error) error {
			if os.IsNotExist(err) {
				return nil
			}
			if err != nil {
				return err
			}
			info, err := e.Info()
			if err != nil {
				return err
			}
			sums[path] = info.Mode().String()
			if info.Mode().IsRegular() {
				sums[path] += " " + sum(read(m.t, path))
			}
			return nil
		})
		if err != nil {
			m.t.Fatal(err)
		}
	}
	return sums
}

func sum(text string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(text))) }

// same checks that the files are as they were.
func (m *machine) same(was map[string]string) {
	m.t.Helper()
	is := m.files()
	for path, sum := range was {
		if is[path] != sum {
			m.t.Errorf("%s: %s, was %s", path, is[path], sum)
		}
	}
	for path := range is {
		if _, ok := was[path]; !ok {
			m.t.Errorf("%s is left", path)
		}
	}
}

// machines are those to install on.
func machines() map[string]func(t *testing.T) *machine {
	debian12 := func(t *testing.T) *machine { return newMachine(t, "/") }
	with := func(dir string) func(t *testing.T) *machine {
		return func(t *testing.T) *machine {
			m := debian12(t)
			m.upgrade(dir)
			return m
		}
	}
	return map[string]func(t *testing.T) *machine{
		"1.6":   debian12,
		"1.7":   func(t *testing.T) *machine { return newMachine(t, filepath.Join(tools, "trixie")) },
		"2.0.7": with("containerd-2.0.7"),
		"2.2.9": with("containerd-2.2.9"),
		"2.4.2": with("bin"),
	}
}

// upgrade gives the machine the containerd of a directory of the tools, in the
// place of the one that containerd.service starts.
func (m *machine) upgrade(dir string) {
	m.t.Helper()
	for _, name := range []string{"containerd", "containerd-shim-runc-v2"} {
		output(m.t, command(m.t, "install", filepath.Join(tools, dir, name), filepath.Join(m.root, "usr/bin", name)))
	}
}
