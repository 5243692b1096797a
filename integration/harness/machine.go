package harness

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// Machine is the root of a machine of its own, in which its containerd and
// pilot run by chroot.
type Machine struct {
	T    testing.TB
	Root string
	Lib  string // its /var/lib/containerd
}

// NewMachine makes a machine on top of a root directory, with our programs.
func NewMachine(t testing.TB, lower string) *Machine {
	t.Helper()
	programs := lowers.make(t, "programs", func(dir string) error {
		var files []string
		for _, name := range []string{"pilot", "pilot-decoder", "ctr-pilot"} {
			files = append(files, filepath.Join(Bin, name))
		}
		return run("install", append(append([]string{"-D", "-t", filepath.Join(dir, "usr/local/bin")}, files...), filepath.Join(Tools, "bin/ctr"))...)
	})
	return newMachine(t, programs, frozen(t, lower), lower)
}

// BareMachine makes a machine that is as the root directory.
func BareMachine(t testing.TB, lower string) *Machine {
	t.Helper()
	return newMachine(t, frozen(t, lower), lower)
}

// newMachine makes a machine on top of directories, of which the first is the topmost.
func newMachine(t testing.TB, lower ...string) *Machine {
	t.Helper()
	dir := TempDir(t)
	m := &Machine{t, filepath.Join(dir, "root"), filepath.Join(dir, "lib")}
	for _, name := range []string{"upper", "work", "lib"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m.Mount("overlay", "", "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", strings.Join(lower, ":"), dir, dir))
	// The machine that runs the tests may have had a pilot.
	if err := os.RemoveAll(filepath.Join(m.Root, "var/lib/pilot")); err != nil {
		t.Fatal(err)
	}
	m.Mount("proc", "proc", "proc", 0, "")
	m.Mount("/dev", "dev", "", syscall.MS_BIND|syscall.MS_REC, "")
	m.Mount("/sys", "sys", "", syscall.MS_BIND|syscall.MS_REC, "")
	m.Mount("tmpfs", "run", "tmpfs", 0, "")
	m.Mount("tmpfs", "tmp", "tmpfs", 0, "")
	m.Mount("tmpfs", "var/tmp", "tmpfs", 0, "")
	m.Mount(m.Lib, "var/lib/containerd", "", syscall.MS_BIND, "")
	return m
}

// frozen returns a directory with those of a root whose files are compared, so that what
// others install on the machine that runs the tests does not show in them.
func frozen(t testing.TB, root string) string {
	t.Helper()
	return lowers.make(t, root, func(dir string) error {
		for _, name := range []string{"etc", "usr/lib/systemd"} {
			target := filepath.Join(dir, name)
			if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
				return err
			}
			// Files that disappear meanwhile are no fault.
			exec.Command("cp", "-a", filepath.Join(root, name), target).Run()
			if err := syscall.Setxattr(target, "trusted.overlay.opaque", []byte("y"), 0); err != nil {
				return fmt.Errorf("%s: %w", target, err)
			}
		}
		return nil
	})
}

// lowers are directories below the machines of a package.
var lowers lowerDirs

// lowerDirs are directories that several machines have below their own, by what they
// contain. Each is a file system in memory: overlayfs refuses a lower directory inside
// another, such as the root of the machine that runs the tests.
type lowerDirs struct {
	mu   sync.Mutex
	dirs map[string]string
}

// make returns the directory of that content, which fill puts there if it is new.
func (l *lowerDirs) make(t testing.TB, content string, fill func(dir string) error) string {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	if dir, ok := l.dirs[content]; ok {
		return dir
	}
	dir, err := os.MkdirTemp(Bin, "lower-")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err == nil {
		err = syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=0755")
	}
	if err == nil {
		if l.dirs == nil {
			l.dirs = map[string]string{}
		}
		l.dirs[content] = dir
		err = fill(dir)
	}
	if err != nil {
		t.Fatalf("make a lower directory: %v", err)
	}
	return dir
}

// remove removes the directories at the end of a package's tests.
func (l *lowerDirs) remove() {
	for _, dir := range l.dirs {
		syscall.Unmount(dir, syscall.MNT_DETACH)
	}
}

func run(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, out)
	}
	return nil
}

// Mount mounts something on the machine until the end of the test.
func (m *Machine) Mount(source, target, kind string, flags uintptr, data string) {
	m.T.Helper()
	target = filepath.Join(m.Root, target)
	if err := os.MkdirAll(target, 0o755); err != nil {
		m.T.Fatal(err)
	}
	if err := syscall.Mount(source, target, kind, flags, data); err != nil {
		m.T.Fatalf("mount %s: %v", target, err)
	}
	m.T.Cleanup(func() {
		if err := syscall.Unmount(target, syscall.MNT_DETACH); err != nil {
			m.T.Errorf("unmount %s: %v", target, err)
		}
	})
}

// AddProgram puts a program into the machine's /usr/local/bin.
func (m *Machine) AddProgram(file string) {
	m.T.Helper()
	Output(m.T, Command(m.T, "install", "-D", file, filepath.Join(m.Root, "usr/local/bin", filepath.Base(file))))
}

// Start starts a program of the machine's.
func (m *Machine) Start(t testing.TB, name string, args ...string) *Process {
	t.Helper()
	cmd := exec.Command("chroot", append([]string{m.Root, name}, args...)...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}
	return Start(t, filepath.Dir(m.Root), filepath.Base(name), cmd)
}

// Run returns a command on the machine.
func (m *Machine) Run(name string, args ...string) *exec.Cmd {
	m.T.Helper()
	cmd := Command(m.T, "chroot", append([]string{m.Root, name}, args...)...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}
	return cmd
}

// BrokerAt puts a broker's socket at copilot's usual place on the machine.
func (m *Machine) BrokerAt(url string) {
	m.T.Helper()
	socket := m.Root + "/run/copilot/copilot.sock"
	Write(m.T, socket, "")
	if err := syscall.Mount(strings.TrimPrefix(url, "unix://"), socket, "", syscall.MS_BIND, ""); err != nil {
		m.T.Fatal(err)
	}
	m.T.Cleanup(func() { syscall.Unmount(socket, syscall.MNT_DETACH) })
}

// Pilot returns a command of pilot's on the machine from outside.
func (m *Machine) Pilot(args ...string) *exec.Cmd {
	m.T.Helper()
	return Command(m.T, "pilot", append(args, "--root", m.Root)...)
}

// Files returns the sums of the files below the machine's /etc and what
// else an installation writes.
func (m *Machine) Files() map[string]string {
	m.T.Helper()
	sums := map[string]string{}
	for _, dir := range []string{"etc", "var/lib/pilot", "usr/lib/systemd"} {
		err := filepath.WalkDir(filepath.Join(m.Root, dir), func(path string, e fs.DirEntry, err error) error {
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
				sums[path] += " " + m.sum(path, info)
			}
			return nil
		})
		if err != nil {
			m.T.Fatal(err)
		}
	}
	return sums
}

// sums are those of files that machines share, by name, inode, size and times: a change,
// even back to what was there, gives a file another time of change.
var sums sync.Map

// sum returns the sum of a file, which was computed before for most of them.
func (m *Machine) sum(path string, info fs.FileInfo) string {
	m.T.Helper()
	stat := info.Sys().(*syscall.Stat_t)
	key := fmt.Sprint(strings.TrimPrefix(path, m.Root), stat.Ino, stat.Size, stat.Mtim, stat.Ctim)
	sum, ok := sums.Load(key)
	if !ok {
		sum = SHA256(Read(m.T, path))
		sums.Store(key, sum)
	}
	return sum.(string)
}

// CheckFiles checks that the files are as they were.
func (m *Machine) CheckFiles(was map[string]string) {
	m.T.Helper()
	is := m.Files()
	for path, sum := range was {
		if is[path] != sum {
			m.T.Errorf("%s: %s, was %s", path, is[path], sum)
		}
	}
	for path := range is {
		if _, ok := was[path]; !ok {
			m.T.Errorf("%s is left", path)
		}
	}
}

// Machines are those to install on.
func Machines() map[string]func(t *testing.T) *Machine {
	debian12 := func(t *testing.T) *Machine { return NewMachine(t, "/") }
	with := func(dir string) func(t *testing.T) *Machine {
		return func(t *testing.T) *Machine {
			m := debian12(t)
			m.Upgrade(dir)
			return m
		}
	}
	return map[string]func(t *testing.T) *Machine{
		"1.6":   debian12,
		"1.7":   func(t *testing.T) *Machine { return NewMachine(t, filepath.Join(Tools, "trixie")) },
		"2.0.7": with("containerd-2.0.7"),
		"2.2.9": with("containerd-2.2.9"),
		"2.4.2": with("bin"),
	}
}

// Upgrade gives the machine the containerd of a directory of the tools, in the
// place of the one that containerd.service starts.
func (m *Machine) Upgrade(dir string) {
	m.T.Helper()
	for _, name := range []string{"containerd", "containerd-shim-runc-v2"} {
		Output(m.T, Command(m.T, "install", filepath.Join(Tools, dir, name), filepath.Join(m.Root, "usr/bin", name)))
	}
}

// NewCRIOMachine makes a machine with the files of CRI-O, but not its programs, and no
// containerd.
func NewCRIOMachine(t testing.TB) *Machine {
	t.Helper()
	m := NewMachine(t, filepath.Join(Tools, "trixie"))
	m.OnlyCRIO()
	return m
}

// OnlyCRIO replaces the machine's containerd by what CRI-O has but its programs.
func (m *Machine) OnlyCRIO() {
	t := m.T
	t.Helper()
	for _, name := range []string{"usr/bin/containerd", "etc/containerd"} {
		if err := os.RemoveAll(filepath.Join(m.Root, name)); err != nil {
			t.Fatal(err)
		}
	}
	Write(t, m.Root+"/usr/lib/systemd/system/crio.service", "[Service]\nType=notify\nEnvironmentFile=-/etc/sysconfig/crio\nExecStart=/usr/local/bin/crio\n\n[Install]\nWantedBy=multi-user.target\n")
	Write(t, m.Root+"/etc/crio/crio.conf.d/10-test.conf", `[crio]
storage_driver = "vfs"
[crio.runtime]
cgroup_manager = "cgroupfs"
conmon_cgroup = "pod"
disable_hostport_mapping = true
[crio.runtime.runtimes.crun]
monitor_cgroup = "pod"
`)
	// CRI-O makes it.
	if err := os.MkdirAll(m.Root+"/etc/crio/policies", 0o755); err != nil {
		t.Fatal(err)
	}
	Write(t, m.Root+"/etc/containers/policy.json", `{"default": [{"type": "insecureAcceptAnything"}]}`)
}

// UnknownSettings is what an older one says of settings that it does not know.
var UnknownSettings = regexp.MustCompile(`(?m)^.*Unknown key '(RestartSteps|RestartMaxDelaySec)'.*$`)

// CheckUnits checks that the machine's containerd can read its configuration, and
// returns it.
func (m *Machine) CheckUnits() string {
	m.T.Helper()
	return Output(m.T, m.Run("containerd", "config", "dump"))
}
