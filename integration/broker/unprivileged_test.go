package broker

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
	"golang.org/x/sys/unix"
)

// The users of the test, who need not be in /etc/passwd.
const nobody, copilotUser = 65534, 54321

// as calls f in a thread that is another user's, without groups and
// capabilities. The thread ends with it.
func as(t testing.TB, uid int, f func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		defer close(done)
		runtime.LockOSThread()
		for _, call := range [][4]uintptr{{unix.SYS_SETGROUPS}, {unix.SYS_SETRESGID, uintptr(uid), uintptr(uid), uintptr(uid)}, {unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)}} {
			if _, _, errno := unix.RawSyscall(call[0], call[1], call[2], call[3]); errno != 0 {
				done <- errno
				return
			}
		}
		f()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// connects reports whether the calling thread may connect to a unix socket.
func connects(path string) bool {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
	return !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EPERM)
}

// opens reports whether the calling thread may open a file so.
func opens(path string, flags int) bool {
	fd, err := unix.Open(path, flags|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err == nil {
		unix.Close(fd)
	}
	return err == nil
}

// reachable returns what a user may read, write or connect to below dir.
func reachable(t testing.TB, uid int, dir string) (all []string) {
	t.Helper()
	modes := map[string]fs.FileMode{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) { // something is at work there
			return nil
		}
		if err == nil {
			modes[path] = d.Type()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	as(t, uid, func() {
		for path, mode := range modes {
			what := strings.TrimPrefix(path, dir)
			switch mode {
			case fs.ModeSocket:
				if connects(path) {
					all = append(all, "connect "+what)
				}
			case fs.ModeDir:
				if probe := path + "/probe"; opens(probe, os.O_CREATE|os.O_WRONLY) {
					os.Remove(probe)
					all = append(all, "create in "+what)
				}
			case 0:
				if opens(path, os.O_RDONLY) {
					all = append(all, "read "+what)
				}
				if opens(path, os.O_WRONLY) {
					all = append(all, "write "+what)
				}
			}
		}
	})
	slices.Sort(all)
	return all
}

// spies returns what a user can learn about a process.
func spies(t testing.TB, uid, pid int) (found []string) {
	t.Helper()
	as(t, uid, func() {
		for _, name := range []string{"mem", "environ", "maps", "auxv", "stack", "fd/0", "root", "exe"} {
			path := fmt.Sprintf("/proc/%d/%s", pid, name)
			fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
			if err != nil {
				continue
			}
			// The right to open some of these says nothing.
			if n, err := unix.Pread(fd, make([]byte, 1), 0); name != "mem" && err != nil && err != unix.EISDIR || n == 0 && name == "environ" {
				unix.Close(fd)
				continue
			}
			unix.Close(fd)
			found = append(found, name)
		}
		if err := unix.PtraceSeize(pid); err == nil {
			found = append(found, "ptrace")
			unix.PtraceDetach(pid)
		}
		if _, err := unix.ProcessVMReadv(pid, []unix.Iovec{{Base: new(byte), Len: 1}}, []unix.RemoteIovec{{Base: 0x400000, Len: 1}}, 0); err != unix.EPERM {
			found = append(found, "process_vm_readv")
		}
	})
	return found
}

// TestUnprivilegedUserGetsNoKEK has a user without rights try everything on a node and on the
// broker's machine. copilot runs as a user of its own.
func TestUnprivilegedUserGetsNoKEK(t *testing.T) {
	t.Parallel()
	if err := os.Chmod(harness.Bin, 0o755); err != nil {
		t.Fatal(err)
	}
	// Others may enter what the test makes, so what is closed is closed by us.
	shared := func() string {
		dir := harness.TempDir(t)
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	dir := shared()
	if err := os.Mkdir(dir+"/run", 0o755); err != nil {
		t.Fatal(err)
	}
	harness.Output(t, harness.Command(t, "copilot", "init", "--config-dir", dir+"/etc", "--dir", dir+"/store", "--host", "127.0.0.1", "--trust-domain", "example.com"))
	policy := harness.Read(t, dir+"/etc/policy.toml") + "\n[[rule]]\nidentities = [\"uid:0\"]\nkeks = [\"*\"]\nactions = [\"export\", \"wrap\", \"unwrap\"]\n"
	harness.Write(t, dir+"/etc/policy.toml", policy)
	// As copilot init does if there is a user copilot.
	if err := os.Mkdir(dir+"/store", 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		t.Fatal(err)
	}
	for _, name := range []string{"run", "store", "etc/server-key.pem"} {
		if err := os.Chown(dir+"/"+name, copilotUser, copilotUser); err != nil {
			t.Fatal(err)
		}
	}
	serve := exec.Command("copilot", "serve", "--config", dir+"/etc/copilot.toml", "--listen", "unix://"+dir+"/run/copilot.sock")
	serve.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: copilotUser, Gid: copilotUser}}
	serve.Dir = dir
	copilot := harness.Start(t, dir, "copilot", serve)
	harness.Await(t, "copilot", harness.Reachable(dir+"/run/copilot.sock"))
	harness.Output(t, harness.Command(t, "copilot", "keys", "create", "--config", dir+"/etc/copilot.toml", "team-a"))

	home := shared()
	url := "unix://" + dir + "/run/copilot.sock"
	provider, conf := harness.StartPilot(t, home, url, "--admin-listen", "unix://"+home+"/admin.sock")
	c := harness.NewCI(t, dir+"/ci", conf)
	image := c.BigImage("provider:pilot:team-a")
	n := harness.NewDifferNode(t, home, harness.DifferConfig{Containerd: harness.Containerd2()})
	harness.Output(t, n.Ctr("images", "pull", "--plain-http", image)) // so that there is an unpacked one, too
	harness.Output(t, n.Ctr("images", "remove", "--sync", image))

	// What everybody may read: the configuration, which copilot's user has to read, and
	// certificates, which are public.
	public := []string{"read /etc/admin.pem", "read /etc/ca.pem", "read /etc/copilot.toml", "read /etc/policy.toml", "read /etc/public-keys.pem", "read /etc/server.pem"}
	var seen []string
	for tries := 0; seen == nil && tries < 20; tries++ {
		pull := n.Crictl("pull", image)
		if err := pull.Start(); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- pull.Wait() }()
		if n.Unpacking("overlayfs", done) {
			seen = append([]string{}, reachable(t, nobody, home)...)
			if len(done) > 0 {
				seen = nil // it was over before the end of the search
			}
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if seen == nil {
			harness.Output(t, n.Crictl("rmi", image))
		}
	}
	if seen == nil {
		t.Fatal("no layer was being unpacked while nobody looked")
	}
	for _, what := range seen {
		t.Errorf("on the node nobody may %s", what)
	}
	for _, what := range reachable(t, nobody, home) {
		t.Errorf("after the pull nobody may %s", what)
	}
	for _, what := range reachable(t, nobody, dir) {
		if !slices.Contains(public, what) && !strings.HasPrefix(what, "read /ci/docker-registry/") && what != "read /ci/docker-registry.yml" {
			t.Errorf("on the broker's machine nobody may %s", what)
		}
	}
	for name, pid := range map[string]int{"pilot": provider.Cmd.Process.Pid, "copilot": copilot.Cmd.Process.Pid} {
		if found := spies(t, nobody, pid); len(found) > 0 {
			t.Errorf("nobody may see %s of %s", found, name)
		}
	}
	// Nor may another program of copilot's own user look into its memory.
	if found := spies(t, copilotUser, copilot.Cmd.Process.Pid); len(found) > 0 {
		t.Errorf("copilot's user may see %s of it", found)
	}

	// The search works.
	open := shared()
	harness.Write(t, open+"/key", "secret")
	os.Chmod(open+"/key", 0o644)
	os.Mkdir(open+"/dir", 0o755)
	os.Chmod(open+"/dir", 0o777)
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err == nil {
		defer unix.Close(l)
		err = errors.Join(unix.Bind(l, &unix.SockaddrUnix{Name: open + "/s"}), unix.Listen(l, 5), os.Chmod(open+"/s", 0o666))
	}
	if err != nil {
		t.Fatal(err)
	}
	if got, want := reachable(t, nobody, open), []string{"connect /s", "create in /dir", "read /key"}; !slices.Equal(got, want) {
		t.Errorf("of what is open it finds %q", got)
	}
	sleep := exec.Command("sleep", "100")
	sleep.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	victim := harness.Start(t, open, "sleep", sleep)
	time.Sleep(100 * time.Millisecond)
	if found := spies(t, nobody, victim.Cmd.Process.Pid); !slices.Contains(found, "mem") || !slices.Contains(found, "environ") || !slices.Contains(found, "ptrace") {
		t.Errorf("of nobody's own process nobody sees %s", found)
	}
}
