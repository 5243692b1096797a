//go:build node || packages || kubernetes || engines

package harness

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// BootedMachine is a machine that systemd runs.
type BootedMachine struct {
	*Machine
	Init   int // process of its init
	start  func() *Process
	nspawn *Process
}

// Boot boots a machine on top of a root directory, as systemd-nspawn does with
// further arguments.
func Boot(t testing.TB, lower string, args []string, prepare func(*Machine)) *BootedMachine {
	t.Helper()
	for _, name := range []string{"/usr/bin/systemd-nspawn", filepath.Join(lower, "usr/lib/systemd/systemd")} {
		if _, err := os.Stat(name); err != nil {
			t.Fatalf("%s is missing: install it with \"scripts/install-tools.sh %s\"", name, Tools)
		}
	}
	dir := TempDir(t)
	m := &Machine{t, filepath.Join(dir, "root"), filepath.Join(dir, "lib")}
	for _, name := range []string{"upper", "work", "lib"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m.Mount("overlay", "", "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", lower, dir, dir))
	Write(t, m.Root+"/etc/hosts", "127.0.0.1 localhost\n")
	prepare(m)
	// nspawn leaves it unless /run is a tmpfs.
	t.Cleanup(func() { os.Remove("/run/systemd/nspawn/propagate/" + filepath.Base(dir)) })
	b := &BootedMachine{Machine: m, start: func() *Process {
		cmd := exec.Command("systemd-nspawn", append([]string{"--boot", "--register=no", "--keep-unit", "--console=pipe", "--system-call-filter=@keyring bpf",
			"--kill-signal=SIGRTMIN+3", "--machine=" + filepath.Base(dir), "--directory=" + m.Root, "--bind=" + m.Lib + ":/var/lib/containerd"}, args...)...)
		cmd.Env = append(os.Environ(), "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1")
		return Start(t, dir, "systemd-nspawn", cmd)
	}}
	b.boot(t)
	return b
}

// boot starts the machine, and waits until its containerd or CRI-O answers.
func (b *BootedMachine) boot(t testing.TB) {
	t.Helper()
	b.nspawn = b.start()
	Await(t, "the machine's init", func() error {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", b.nspawn.Cmd.Process.Pid))
		if err != nil {
			return err
		}
		if b.Init, err = strconv.Atoi(strings.TrimSpace(string(children))); err != nil {
			return err
		}
		// At first the child is another nspawn.
		if name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", b.Init)); err != nil || string(name) != "systemd\n" {
			return fmt.Errorf("it is %s: %v", name, err)
		}
		return nil
	})
	Await(t, "the machine's containerd or CRI-O", func() error {
		return b.Run("sh", "-c", "ctr version || systemctl --quiet is-active crio.service").Run()
	})
}

// Reboot reboots the machine.
func (b *BootedMachine) Reboot(t testing.TB) {
	t.Helper()
	b.Output("systemctl", "reboot")
	// It leaves booting again to its service.
	select {
	case <-b.nspawn.Done:
	case <-time.After(Timeout):
		t.Fatal("the machine does not shut down")
	}
	b.boot(t)
}

// Run returns a command on the machine.
func (b *BootedMachine) Run(name string, args ...string) *exec.Cmd {
	b.T.Helper()
	cmd := Command(b.T, "nsenter", append([]string{"--target", strconv.Itoa(b.Init), "--mount", "--pid", "--uts", "--ipc", "--cgroup", "--root", "--wd", name}, args...)...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "DEBIAN_FRONTEND=noninteractive"}
	return cmd
}

// Output runs a command on the machine that has to succeed, and returns what it
// says.
func (b *BootedMachine) Output(name string, args ...string) string {
	b.T.Helper()
	out, err := b.Run(name, args...).CombinedOutput()
	if err != nil {
		b.T.Fatalf("%s %q: %v\n%s\n%s", name, args, err, out, CombinedOutput(b.T, b.Run("journalctl", "--no-pager", "-n", "40")))
	}
	return strings.TrimSpace(string(out))
}

// PID returns the main process of a service, which is 0 if it does not run.
func (b *BootedMachine) PID(service string) string {
	b.T.Helper()
	return strings.TrimSpace(Output(b.T, b.Run("systemctl", "show", "--property=MainPID", "--value", service)))
}
