package integration

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestNodeUnits installs for a containerd whose unit has its configuration file in
// quotes and in variables, and refuses one that only systemd can read.
func TestNodeUnits(t *testing.T) {
	t.Parallel()
	const file = "/opt/my c/config.toml"
	for name, unit := range map[string]string{
		"escaped": "ExecStart=/usr/bin/containerd \\\n  --config /opt/my\\x20c/config.toml",
		"file":    "EnvironmentFile=-/etc/default/containerd\nExecStart=/usr/bin/containerd --config ${DIR}/config.toml",
	} {
		t.Run(name, func(t *testing.T) {
			m := machines()["2.4.2"](t)
			write(t, m.root+file, "version = 3\n")
			write(t, m.root+"/etc/default/containerd", "DIR=\"/opt/my c\"\n")
			write(t, m.root+"/etc/systemd/system/containerd.service.d/ours.conf", "[Service]\nExecStart=\n"+unit+"\n")
			before := m.files()
			output(t, m.pilot("node", "install"))
			if _, err := os.Stat(m.root + "/opt/my c/conf.d/pilot.toml"); err != nil {
				t.Error(err)
			}
			output(t, m.pilot("node", "uninstall"))
			m.same(before)
			if got := read(t, m.root+file); got != "version = 3\n" {
				t.Errorf("left: %s", got)
			}
		})
	}
	m := machines()["2.4.2"](t)
	write(t, m.root+"/etc/systemd/system/containerd.service.d/ours.conf", "[Service]\nExecStart=\nExecStart=/usr/bin/containerd --config /etc/%H.toml\n")
	before := m.files()
	fails(t, m.pilot("node", "install"), "/etc/systemd/system/containerd.service.d/ours.conf: ExecStart=", "what %H is, only systemd knows", "--containerd-config")
	m.same(before)
	output(t, m.pilot("node", "install", "--containerd-binary", "/usr/bin/containerd", "--containerd-config", containerdConfig))
}

// TestNodeProgramMoved has containerd's program move, with and without its unit, and
// its unit read another file, before it starts.
func TestNodeProgramMoved(t *testing.T) {
	t.Parallel()
	m := configured(t, "2.2.9", "version = 2\n")
	const unit = "/etc/systemd/system/containerd.service.d/ours.conf"
	output(t, m.pilot("node", "install"))
	if err := os.Rename(m.root+"/usr/bin/containerd", m.root+"/usr/local/bin/containerd"); err != nil {
		t.Fatal(err)
	}
	noted := func(program string) {
		t.Helper()
		// Written anew, so that there is something to do.
		write(t, m.root+containerdConfig, "version = 2\n")
		output(t, m.run("pilot", "node", "refresh"))
		if got := read(t, m.root+nodeState); !strings.Contains(got, `"program": "`+program+`"`) {
			t.Errorf("noted: %s", got)
		}
		if dump := m.loads(); !strings.Contains(dump, "diff.sock") {
			t.Error("pilot is not configured")
		}
	}
	noted("/usr/local/bin/containerd")
	output(t, command(t, "install", "-D", m.root+"/usr/local/bin/containerd", m.root+"/opt/new/containerd"))
	write(t, m.root+unit, "[Service]\nExecStart=\nExecStart=/opt/new/containerd\n")
	noted("/opt/new/containerd")

	write(t, m.root+unit, "[Service]\nExecStart=\nExecStart=/opt/new/containerd --config /opt/c.toml\n")
	fails(t, m.run("pilot", "node", "refresh"), "its containerd reads /opt/c.toml now", "pilot node install")
	os.Remove(m.root + unit)
	os.Remove(m.root + "/opt/new/containerd")
	os.Remove(m.root + "/usr/local/bin/containerd")
	fails(t, m.run("pilot", "node", "refresh"), "is gone", "pilot node install")
	output(t, m.run("pilot", "node", "uninstall"))
}

// TestNodeOddFiles has something else than files among those that containerd
// imports: containerd waits for a named pipe, reads a device without end, does not
// start with a directory, and takes /dev/null for an empty file.
func TestNodeOddFiles(t *testing.T) {
	t.Parallel()
	const odd = "/etc/containerd/conf.d/odd.toml"
	for name, test := range map[string]struct{ make, want string }{
		"named pipe": {"mkfifo " + odd, "a named pipe"},
		"device":     {"mknod " + odd + " c 1 5", "a device"}, // /dev/zero
		"directory":  {"mkdir " + odd, "a directory"},
	} {
		t.Run(name, func(t *testing.T) {
			m := configured(t, "2.2.9", "version = 2\nimports = ['/etc/containerd/conf.d/*.toml']\n")
			output(t, m.pilot("node", "install"))
			installed := m.files()
			output(t, m.run("sh", "-c", test.make))
			began := time.Now()
			for _, what := range []string{"install", "refresh"} {
				fails(t, m.run("pilot", "node", what), odd+": containerd reads it as a configuration file, and it is "+test.want, "move it away")
			}
			if took := time.Since(began); took > 40*time.Second {
				t.Errorf("it took %v", took)
			}
			os.Remove(m.root + odd)
			m.same(installed)
		})
	}
	t.Run("null", func(t *testing.T) {
		m := configured(t, "2.2.9", "version = 2\nimports = ['/etc/containerd/conf.d/*.toml']\n")
		output(t, m.run("sh", "-c", "mkdir -p /etc/containerd/conf.d; ln -s /dev/null "+odd))
		m.loads()
		output(t, m.pilot("node", "install"))
		output(t, m.pilot("node", "uninstall"))
	})
}

// TestNodeCopilotBeside uninstalls where containerd's configuration was written from
// a dump with pilot in it, and has copilot's name in it, too.
func TestNodeCopilotBeside(t *testing.T) {
	t.Parallel()
	const copilot = "version = 2\nroot = '/var/lib/copilot'\nstate = '/run/pilot/state'\n[plugins.'io.containerd.grpc.v1.cri'.registry]\n  config_path = '/etc/pilot-certs'\n"
	m := configured(t, "2.2.9", copilot)
	output(t, m.pilot("node", "install"))
	dumped := m.loads()
	write(t, m.root+containerdConfig, dumped)
	out := fails(t, m.pilot("node", "uninstall"), containerdConfig+":", "take pilot out of these lines")
	for number, line := range strings.Split(dumped, "\n") {
		at := containerdConfig + ":" + strconv.Itoa(number+1) + ","
		named := strings.Contains(strings.ReplaceAll(out, ": containerd", ", containerd"), at)
		should := strings.Contains(line, "diff.sock") || strings.Contains(line, "'pilot'") || strings.Contains(line, "proxy_plugins.pilot") || strings.Contains(line, "/pilot*.toml") || strings.Contains(line, "/pilot.toml")
		if named != should {
			t.Errorf("line %d, %s: named is %v, in %s", number+1, line, named, out)
		}
	}
	// What is copilot's alone is no reason to refuse.
	write(t, m.root+containerdConfig, copilot+"[proxy_plugins.copilot]\n  type = 'snapshot'\n  address = '/run/copilot/pilot.sock'\n")
	output(t, m.pilot("node", "uninstall"))
}

// TestNodeStaleTrials finds what a trial has left that was killed, and directories
// of the same name that are not root's own.
func TestNodeStaleTrials(t *testing.T) {
	t.Parallel()
	m := configured(t, "2.2.9", "version = 2\n")
	long := time.Now().Add(-time.Hour)
	for name, test := range map[string]struct {
		mode  os.FileMode
		owner int
		age   time.Time
		stays bool
	}{
		"stale":    {0o700, 0, long, false},
		"new":      {0o700, 0, time.Now(), true},
		"readable": {0o755, 0, long, true},
		"theirs":   {0o700, 65534, long, true},
	} {
		dir := m.root + "/tmp/pilot-trial-" + name
		write(t, dir+"/config.toml", "version = 2\n")
		for _, err := range []error{os.Chmod(dir, test.mode), os.Chown(dir, test.owner, 0), os.Chtimes(dir, test.age, test.age)} {
			if err != nil {
				t.Fatal(err)
			}
		}
		defer func() {
			if _, err := os.Stat(dir); (err == nil) != test.stays {
				t.Errorf("%s: %v", name, err)
			}
		}()
	}
	if err := os.Symlink("/etc", m.root+"/tmp/pilot-trial-link"); err != nil {
		t.Fatal(err)
	}
	output(t, m.pilot("node", "install"))
	if _, err := os.Stat(m.root + containerdConfig); err != nil {
		t.Error(err)
	}
}

// TestNodeNamedContainerd has root run another program under containerd's name.
func TestNodeNamedContainerd(t *testing.T) {
	t.Parallel()
	m := configured(t, "2.2.9", "version = 2\n")
	m.start(t, "bash", "-c", "exec -a containerd sleep 1000")
	await(t, "the other program", func() error {
		found, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, file := range found {
			if text, err := os.ReadFile(file); err == nil && string(text) == "containerd\x001000\x00" {
				return nil
			}
		}
		return os.ErrNotExist
	})
	m.containerd(t, "/run/containerd/containerd.sock")
	if out := said(t, m.run("pilot", "node", "install")); !strings.Contains(out, "configured by "+containerdConfig) {
		t.Errorf("install: %s", out)
	}
}

// TestNodeFixedConfiguration installs where containerd's configuration file can't be
// replaced.
func TestNodeFixedConfiguration(t *testing.T) {
	t.Parallel()
	m := configured(t, "2.2.9", "version = 2\n")
	before := m.files()
	source := m.root + "/opt/config.toml"
	write(t, source, "version = 2\n")
	if err := syscall.Mount(source, m.root+containerdConfig, "", syscall.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	fails(t, m.pilot("node", "install"), containerdConfig+": it is mounted", "findmnt")
	m.same(before)
	write(t, source, "version = 2\nimports = ['/etc/containerd/conf.d/pilot*.toml']\n")
	before = m.files()
	output(t, m.pilot("node", "install"))
	output(t, m.pilot("node", "uninstall"))
	m.same(before)
	if err := syscall.Unmount(m.root+containerdConfig, 0); err != nil {
		t.Fatal(err)
	}
	if err := command(t, "chattr", "+i", m.root+containerdConfig).Run(); err != nil {
		t.Logf("this file system has no immutable files: %v", err)
		return
	}
	defer command(t, "chattr", "-i", m.root+containerdConfig).Run()
	before = m.files()
	fails(t, m.pilot("node", "install"), containerdConfig, "config.toml is immutable", "chattr -ia")
	m.same(before)
}
