//go:build node || packages || kubernetes || engines

package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// booted is a machine that systemd runs.
type booted struct {
	*machine
	init int // process of its init
}

// boot boots a machine on top of a root directory, as systemd-nspawn does with
// further arguments.
func boot(t testing.TB, lower string, args []string, prepare func(*machine)) *booted {
	t.Helper()
	for _, name := range []string{"/usr/bin/systemd-nspawn", filepath.Join(lower, "usr/lib/systemd/systemd")} {
		if _, err := os.Stat(name); err != nil {
			t.Fatalf("%s is missing: install it with \"scripts/install-tools.sh %s\"", name, tools)
		}
	}
	dir := tempDir(t)
	m := &machine{t, filepath.Join(dir, "root"), filepath.Join(dir, "lib")}
	for _, name := range []string{"upper", "work", "lib"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m.mount("overlay", "", "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", lower, dir, dir))
	write(t, m.root+"/etc/hosts", "127.0.0.1 localhost\n")
	prepare(m)
	cmd := exec.Command("systemd-nspawn", append([]string{"--boot", "--register=no", "--keep-unit", "--console=pipe", "--system-call-filter=@keyring bpf",
		"--kill-signal=SIGRTMIN+3", "--machine=" + filepath.Base(dir), "--directory=" + m.root, "--bind=" + m.lib + ":/var/lib/containerd"}, args...)...)
	cmd.Env = append(os.Environ(), "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1")
	// nspawn leaves it unless /run is a tmpfs.
	t.Cleanup(func() { os.Remove("/run/systemd/nspawn/propagate/" + filepath.Base(dir)) })
	p := start(t, dir, "systemd-nspawn", cmd)
	b := &booted{machine: m}
	await(t, "the machine's init", func() error {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", p.cmd.Process.Pid))
		if err != nil {
			return err
		}
		if b.init, err = strconv.Atoi(strings.TrimSpace(string(children))); err != nil {
			return err
		}
		// At first the child is another nspawn.
		if name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", b.init)); err != nil || string(name) != "systemd\n" {
			return fmt.Errorf("it is %s: %v", name, err)
		}
		return nil
	})
	await(t, "the machine's containerd or CRI-O", func() error {
		return b.run("sh", "-c", "ctr version || systemctl --quiet is-active crio.service").Run()
	})
	return b
}

// run returns a command on the machine.
func (b *booted) run(name string, args ...string) *exec.Cmd {
	b.t.Helper()
	cmd := command(b.t, "nsenter", append([]string{"--target", strconv.Itoa(b.init), "--mount", "--pid", "--uts", "--ipc", "--cgroup", "--root", "--wd", name}, args...)...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "DEBIAN_FRONTEND=noninteractive"}
	return cmd
}

// out runs a command on the machine that has to succeed, and returns what it
// says.
func (b *booted) out(name string, args ...string) string {
	b.t.Helper()
	out, err := b.run(name, args...).CombinedOutput()
	if err != nil {
		b.t.Fatalf("%s %q: %v\n%s\n%s", name, args, err, out, said(b.t, b.run("journalctl", "--no-pager", "-n", "40")))
	}
	return strings.TrimSpace(string(out))
}

// pid returns the main process of a service, which is 0 if it does not run.
func (b *booted) pid(service string) string {
	b.t.Helper()
	return strings.TrimSpace(output(b.t, b.run("systemctl", "show", "--property=MainPID", "--value", service)))
}
