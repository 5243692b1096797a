package host

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestServiceIsReadFromCgroup(t *testing.T) {
	for cgroup, want := range map[string]string{
		"0::/system.slice/containerd.service\n":                                       "containerd.service",
		"12:pids:/system.slice/k3s.service\n1:name=systemd:/system.slice/k3s.service": "k3s.service",
		"0::/system.slice/k3s-agent.service/containerd":                               "k3s-agent.service",
		"0::/user.slice/user-0.slice/session-1.scope\n":                               "",
		"0::/\n": "",
		"":       "",
	} {
		if got := unitOf(cgroup); got != want {
			t.Errorf("%q: %q, want %q", cgroup, got, want)
		}
	}
}

// TestProcessIsReadFromProc reads a process with containerd's name.
func TestProcessIsReadFromProc(t *testing.T) {
	before := time.Now()
	pid := startNamed(t, "/opt/bin/containerd", nil)
	boot, err := bootTime()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	p, err := readProcess(dir, "containerd", boot)
	if err != nil || p == nil {
		t.Fatalf("%v, %v", p, err)
	}
	// argv[0] is not the program's path.
	if p.Program == "/opt/bin/containerd" || filepath.Base(p.Program) != "containerd" || p.PPID != os.Getpid() {
		t.Errorf("%+v", p)
	}
	if p.Started.Before(before.Add(-time.Minute)) || p.Started.After(time.Now().Add(time.Minute)) {
		t.Errorf("it was started at %v", p.Started)
	}
	for dir, name := range map[string]string{dir: "dockerd", "/proc/self": "containerd"} {
		if p, err := readProcess(dir, name, boot); err != nil || p != nil {
			t.Errorf("%s: %v, %v", dir, p, err)
		}
	}
}

// TestProcessesThatOnlyClaimTheNameAreLeftOut reads root's processes whose name is not their program's.
func TestProcessesThatOnlyClaimTheNameAreLeftOut(t *testing.T) {
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	boot, err := bootTime()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	copyProgram(t, sleep, filepath.Join(dir, "multi"))
	copyProgram(t, sleep, filepath.Join(dir, ".dockerd-wrapped"))
	copyProgram(t, sleep, filepath.Join(dir, "dockerd"))
	if err := os.Symlink("multi", filepath.Join(dir, "containerd")); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ program, name, want string }{
		{"multi", "containerd", "containerd"}, // as k3s's
		{"multi", "dockerd", ""},
		{".dockerd-wrapped", "dockerd", "dockerd"}, // as NixOS's
		{".dockerd-wrapped", "containerd", ""},
	} {
		pid := startProgram(t, filepath.Join(dir, test.program), test.name, nil)
		p, err := readProcess(filepath.Join("/proc", strconv.Itoa(pid)), test.name, boot)
		if err != nil || (p != nil) != (test.want != "") || p != nil && p.Program != filepath.Join(dir, test.want) {
			t.Errorf("%s as %s: %+v, %v", test.program, test.name, p, err)
		}
	}
}

func copyProgram(t *testing.T, from, to string) {
	t.Helper()
	program, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, program, 0o755); err != nil {
		t.Fatal(err)
	}
}

// startNamed starts a program of that name, with the whole name as its argv[0], as
// another user if credential is not nil, and returns its PID.
func startNamed(t *testing.T, name string, credential *syscall.Credential) int {
	t.Helper()
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/tmp", "pilot-process-") // where another user may run it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, filepath.Base(name))
	copyProgram(t, sleep, program)
	return startProgram(t, program, name, credential)
}

// startProgram starts a program with a name as its argv[0], and returns its PID.
func startProgram(t *testing.T, program, name string, credential *syscall.Credential) int {
	t.Helper()
	cmd := &exec.Cmd{Path: program, Args: []string{name, "1000"}, SysProcAttr: &syscall.SysProcAttr{Credential: credential}}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	// Start returns once the kernel has begun to execute the program, which may be
	// before /proc has its command line.
	for range 6000 {
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", cmd.Process.Pid)); err == nil && strings.HasPrefix(string(b), name+"\x00") {
			return cmd.Process.Pid
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%s does not start", program)
	return 0
}

// TestProcessesOfRootOnly starts a user's program with another program's name, which
// root must not run.
func TestProcessesOfRootOnly(t *testing.T) {
	own := startNamed(t, "containerd-of-root", nil)
	var nobody *syscall.Credential
	if os.Getuid() == 0 {
		nobody = &syscall.Credential{Uid: 65534, Gid: 65534}
	}
	startNamed(t, "containerd-of-nobody", nobody)
	found, err := Host{}.Processes("containerd-of-nobody")
	if err != nil || len(found) > 0 {
		t.Errorf("a user's: %v, %v", found, err)
	}
	found, err = Host{}.Processes("containerd-of-root")
	if isRoot := os.Getuid() == 0; err != nil || isRoot != (len(found) == 1 && found[0].PID == own) {
		t.Errorf("root's: %v, %v", found, err)
	}
}
