package node

import (
	"errors"
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

func TestParseFlags(t *testing.T) {
	for line, want := range map[string]struct {
		flags
		daemon bool
	}{
		"":                       {daemon: true},
		"--config /etc/x.toml":   {flags{config: "/etc/x.toml"}, true},
		"-c /x -a /y.sock":       {flags{"/x", "/y.sock"}, true},
		"-c=/x --address=/y":     {flags{"/x", "/y"}, true},
		"--log-level debug -c /": {flags{config: "/"}, true},
		"config dump":            {},
		"-c /x config dump":      {flags: flags{config: "/x"}},
		"--root /r publish":      {},
		"-c":                     {daemon: true},
		"--version":              {},
		"-c /x -v":               {flags: flags{config: "/x"}},
	} {
		f, daemon := parseFlags(strings.Fields(line))
		if f != want.flags || daemon != want.daemon {
			t.Errorf("%q: %+v, %v", line, f, daemon)
		}
	}
}

func TestUnitOf(t *testing.T) {
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

// TestReadProcess reads a process that is named as containerd is.
func TestReadProcess(t *testing.T) {
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
	// There is no such file, and argv[0] can be anything.
	if p.program == "/opt/bin/containerd" || filepath.Base(p.program) != "containerd" || p.ppid != os.Getpid() {
		t.Errorf("%+v", p)
	}
	if p.started.Before(before.Add(-time.Minute)) || p.started.After(time.Now().Add(time.Minute)) {
		t.Errorf("it was started at %v", p.started)
	}
	for dir, name := range map[string]string{dir: "dockerd", "/proc/self": "containerd"} {
		if p, err := readProcess(dir, name, boot); err != nil || p != nil {
			t.Errorf("%s: %v, %v", dir, p, err)
		}
	}
}

// TestReadProcessNamed reads processes of root that are not what they are named.
func TestReadProcessNamed(t *testing.T) {
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
		if err != nil || (p != nil) != (test.want != "") || p != nil && p.program != filepath.Join(dir, test.want) {
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

// startNamed starts a program of that name, which goes by the whole name, as another
// user if credential is not nil, and returns its PID.
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

// startProgram starts a program under a name.
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
	// Start returns as soon as the kernel has begun to execute the program, which
	// may be before its command line is there.
	for range 6000 {
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", cmd.Process.Pid)); err == nil && strings.HasPrefix(string(b), name+"\x00") {
			return cmd.Process.Pid
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%s does not start", program)
	return 0
}

// TestProcessesOfRootOnly starts a program that a user calls containerd. Root must
// not take it for the machine's, and run it.
func TestProcessesOfRootOnly(t *testing.T) {
	own := startNamed(t, "containerd-of-root", nil)
	var nobody *syscall.Credential
	if os.Getuid() == 0 {
		nobody = &syscall.Credential{Uid: 65534, Gid: 65534}
	}
	startNamed(t, "containerd-of-nobody", nobody)
	found, err := Options{}.processes("containerd-of-nobody")
	if err != nil || len(found) > 0 {
		t.Errorf("a user's: %v, %v", found, err)
	}
	found, err = Options{}.processes("containerd-of-root")
	if isRoot := os.Getuid() == 0; err != nil || isRoot != (len(found) == 1 && found[0].pid == own) {
		t.Errorf("root's: %v, %v", found, err)
	}
}

func TestChoose(t *testing.T) {
	own := &process{pid: 10, program: "/usr/bin/containerd", unit: "containerd.service"}
	elsewhere := &process{pid: 11, program: "/usr/bin/containerd", args: []string{"--config", "/opt/c.toml"}}
	ofK3s := &process{pid: 12, program: "/data/bin/containerd", args: []string{"-c", "/var/lib/rancher/k3s/agent/etc/containerd/config.toml"}, unit: "k3s.service", parent: "k3s-agent"}
	for name, test := range map[string]struct {
		options Options
		found   []*process
		want    *process
		refuses bool
	}{
		"none":                 {found: nil},
		"one":                  {found: []*process{elsewhere}, want: elsewhere},
		"two":                  {found: []*process{own, elsewhere}, refuses: true},
		"two, one named":       {options: Options{ContainerdConfig: "/opt/c.toml"}, found: []*process{own, elsewhere}, want: elsewhere},
		"the default named":    {options: Options{ContainerdConfig: defaultConfig}, found: []*process{own, elsewhere}, want: own},
		"another named":        {options: Options{ContainerdConfig: "/x.toml"}, found: []*process{own}, refuses: true},
		"k3s beside another":   {found: []*process{own, ofK3s}, want: ofK3s},
		"nobody listens":       {options: Options{ContainerdAddress: filepath.Join(t.TempDir(), "s")}, found: []*process{own}},
		"another program":      {options: Options{ContainerdBinary: "/bin/true"}, found: []*process{own}, refuses: true},
		"a name is no program": {options: Options{ContainerdBinary: "containerd"}, found: []*process{own}, want: own},
	} {
		got, err := test.options.choose(test.found)
		var conflict *Conflict
		if got != test.want || errors.As(err, &conflict) != test.refuses {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func TestDistributionAt(t *testing.T) {
	for _, test := range []struct{ config, parent, name string }{
		{defaultConfig, "systemd", ""},
		{"/var/lib/rancher/k3s/agent/etc/containerd/config.toml", "k3s-server", k3s},
		{"/data/agent/etc/containerd/config.toml", "k3s-agent", k3s},
		{"/var/lib/rancher/rke2/agent/etc/containerd/config.toml", "rke2", rke2},
		{"/etc/k0s/containerd.toml", "k0s", k0s},
		{"/var/run/docker/containerd/containerd.toml", "dockerd", "Docker"},
		{"/var/snap/microk8s/1/args/containerd.toml", "systemd", "MicroK8s"},
	} {
		if d := (Options{}).distributionAt(test.config, test.parent); d.name != test.name {
			t.Errorf("%s of %s: %+v", test.config, test.parent, d)
		}
	}
}
