package node

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestNodeUnits installs for a containerd whose unit names its configuration file with
// quotes and variables, and rejects one that only systemd can expand.
func TestNodeUnits(t *testing.T) {
	t.Parallel()
	const file = "/opt/my c/config.toml"
	for name, unit := range map[string]string{
		"escaped": "ExecStart=/usr/bin/containerd \\\n  --config /opt/my\\x20c/config.toml",
		"file":    "EnvironmentFile=-/etc/default/containerd\nExecStart=/usr/bin/containerd --config ${DIR}/config.toml",
	} {
		t.Run(name, func(t *testing.T) {
			m := harness.Machines()["2.4.2"](t)
			harness.Write(t, m.Root+file, "version = 3\n")
			harness.Write(t, m.Root+"/etc/default/containerd", "DIR=\"/opt/my c\"\n")
			harness.Write(t, m.Root+"/etc/systemd/system/containerd.service.d/ours.conf", "[Service]\nExecStart=\n"+unit+"\n")
			before := m.Files()
			harness.Output(t, m.Pilot("node", "install"))
			if _, err := os.Stat(m.Root + "/opt/my c/conf.d/pilot.toml"); err != nil {
				t.Error(err)
			}
			harness.Output(t, m.Pilot("node", "uninstall"))
			m.CheckFiles(before)
			if got := harness.Read(t, m.Root+file); got != "version = 3\n" {
				t.Errorf("left: %s", got)
			}
		})
	}
	m := harness.Machines()["2.4.2"](t)
	harness.Write(t, m.Root+"/etc/systemd/system/containerd.service.d/ours.conf", "[Service]\nExecStart=\nExecStart=/usr/bin/containerd --config /etc/%H.toml\n")
	before := m.Files()
	harness.ExpectFailure(t, m.Pilot("node", "install"), "/etc/systemd/system/containerd.service.d/ours.conf: ExecStart=", "only systemd can expand %H", "--containerd-config")
	m.CheckFiles(before)
	harness.Output(t, m.Pilot("node", "install", "--containerd-binary", "/usr/bin/containerd", "--containerd-config", containerdConfig))
}

// TestNodeProgramMoved moves containerd's program, with and without a change of its unit,
// and changes the file that the unit names, before containerd starts.
func TestNodeProgramMoved(t *testing.T) {
	t.Parallel()
	m := configured(t, "2.2.9", "version = 2\n")
	const unit = "/etc/systemd/system/containerd.service.d/ours.conf"
	harness.Output(t, m.Pilot("node", "install"))
	if err := os.Rename(m.Root+"/usr/bin/containerd", m.Root+"/usr/local/bin/containerd"); err != nil {
		t.Fatal(err)
	}
	noted := func(program string) {
		t.Helper()
		// Rewritten, so that there is something to do.
		harness.Write(t, m.Root+containerdConfig, "version = 2\n")
		harness.Output(t, m.Run("pilot", "node", "refresh"))
		if got := harness.Read(t, m.Root+nodeState); !strings.Contains(got, `"program": "`+program+`"`) {
			t.Errorf("noted: %s", got)
		}
		if dump := m.CheckUnits(); !strings.Contains(dump, "diff.sock") {
			t.Error("pilot is not configured")
		}
	}
	noted("/usr/local/bin/containerd")
	harness.Output(t, harness.Command(t, "install", "-D", m.Root+"/usr/local/bin/containerd", m.Root+"/opt/new/containerd"))
	harness.Write(t, m.Root+unit, "[Service]\nExecStart=\nExecStart=/opt/new/containerd\n")
	noted("/opt/new/containerd")

	harness.Write(t, m.Root+unit, "[Service]\nExecStart=\nExecStart=/opt/new/containerd --config /opt/c.toml\n")
	harness.ExpectFailure(t, m.Run("pilot", "node", "refresh"), "its containerd reads /opt/c.toml now", "pilot node install")
	os.Remove(m.Root + unit)
	os.Remove(m.Root + "/opt/new/containerd")
	os.Remove(m.Root + "/usr/local/bin/containerd")
	harness.ExpectFailure(t, m.Run("pilot", "node", "refresh"), "is gone", "pilot node install")
	harness.Output(t, m.Run("pilot", "node", "uninstall"))
}

// TestNodeSpecialFilesInConfiguration imports what is not a regular file: containerd would block on a named
// pipe, read a device without end, not start with a directory, and take /dev/null for an
// empty file.
func TestNodeSpecialFilesInConfiguration(t *testing.T) {
	t.Parallel()
	const odd = "/etc/containerd/conf.d/odd.toml"
	for name, test := range map[string]struct{ make, want string }{
		"named pipe": {"mkfifo " + odd, "a named pipe"},
		"device":     {"mknod " + odd + " c 1 5", "a device"}, // /dev/zero
		"directory":  {"mkdir " + odd, "a directory"},
	} {
		t.Run(name, func(t *testing.T) {
			m := configured(t, "2.2.9", "version = 2\nimports = ['/etc/containerd/conf.d/*.toml']\n")
			harness.Output(t, m.Pilot("node", "install"))
			installed := m.Files()
			harness.Output(t, m.Run("sh", "-c", test.make))
			began := time.Now()
			for _, what := range []string{"install", "refresh"} {
				harness.ExpectFailure(t, m.Run("pilot", "node", what), odd+": containerd reads it as a configuration file, and it is "+test.want, "move it away")
			}
			if took := time.Since(began); took > harness.Timeout {
				t.Errorf("it took %v", took)
			}
			os.Remove(m.Root + odd)
			m.CheckFiles(installed)
		})
	}
	t.Run("null", func(t *testing.T) {
		m := configured(t, "2.2.9", "version = 2\nimports = ['/etc/containerd/conf.d/*.toml']\n")
		harness.Output(t, m.Run("sh", "-c", "mkdir -p /etc/containerd/conf.d; ln -s /dev/null "+odd))
		m.CheckUnits()
		harness.Output(t, m.Pilot("node", "install"))
		harness.Output(t, m.Pilot("node", "uninstall"))
	})
}

// TestNodeCopilotBeside uninstalls after containerd's configuration was rewritten from a
// dump with pilot in it, and has copilot's name in it too.
func TestNodeCopilotBeside(t *testing.T) {
	t.Parallel()
	const copilot = "version = 2\nroot = '/var/lib/copilot'\nstate = '/run/pilot/state'\n[plugins.'io.containerd.grpc.v1.cri'.registry]\n  config_path = '/etc/pilot-certs'\n"
	m := configured(t, "2.2.9", copilot)
	harness.Output(t, m.Pilot("node", "install"))
	dumped := m.CheckUnits()
	harness.Write(t, m.Root+containerdConfig, dumped)
	out := harness.ExpectFailure(t, m.Pilot("node", "uninstall"), containerdConfig+":", "take pilot out of these lines")
	for number, line := range strings.Split(dumped, "\n") {
		at := containerdConfig + ":" + strconv.Itoa(number+1) + ","
		named := strings.Contains(strings.ReplaceAll(out, ": containerd", ", containerd"), at)
		should := strings.Contains(line, "diff.sock") || strings.Contains(line, "'pilot'") || strings.Contains(line, "proxy_plugins.pilot") || strings.Contains(line, "/pilot*.toml") || strings.Contains(line, "/pilot.toml")
		if named != should {
			t.Errorf("line %d, %s: named is %v, in %s", number+1, line, named, out)
		}
	}
	// Lines about copilot alone are no obstacle.
	harness.Write(t, m.Root+containerdConfig, copilot+"[proxy_plugins.copilot]\n  type = 'snapshot'\n  address = '/run/copilot/pilot.sock'\n")
	harness.Output(t, m.Pilot("node", "uninstall"))
}

// TestNodeStaleTrials finds the directory of a trial that was killed, and directories
// with such names that root has not made.
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
		dir := m.Root + "/tmp/pilot-trial-" + name
		harness.Write(t, dir+"/config.toml", "version = 2\n")
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
	if err := os.Symlink("/etc", m.Root+"/tmp/pilot-trial-link"); err != nil {
		t.Fatal(err)
	}
	harness.Output(t, m.Pilot("node", "install"))
	if _, err := os.Stat(m.Root + containerdConfig); err != nil {
		t.Error(err)
	}
}

// TestNodeNamedContainerd runs another program of root with containerd's name.
func TestNodeNamedContainerd(t *testing.T) {
	t.Parallel()
	m := configured(t, "2.2.9", "version = 2\n")
	m.Start(t, "bash", "-c", "exec -a containerd sleep 1000")
	harness.Await(t, "the other program", func() error {
		found, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, file := range found {
			if text, err := os.ReadFile(file); err == nil && string(text) == "containerd\x001000\x00" {
				return nil
			}
		}
		return os.ErrNotExist
	})
	containerd(t, m, "/run/containerd/containerd.sock")
	if out := harness.CombinedOutput(t, m.Run("pilot", "node", "install")); !strings.Contains(out, "configured by "+containerdConfig) {
		t.Errorf("install: %s", out)
	}
}

// TestNodeFixedConfiguration installs where containerd's configuration file can't be
// replaced.
func TestNodeFixedConfiguration(t *testing.T) {
	t.Parallel()
	m := configured(t, "2.2.9", "version = 2\n")
	before := m.Files()
	source := m.Root + "/opt/config.toml"
	harness.Write(t, source, "version = 2\n")
	if err := syscall.Mount(source, m.Root+containerdConfig, "", syscall.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	harness.ExpectFailure(t, m.Pilot("node", "install"), containerdConfig+": it is mounted", "findmnt")
	m.CheckFiles(before)
	harness.Write(t, source, "version = 2\nimports = ['/etc/containerd/conf.d/pilot*.toml']\n")
	before = m.Files()
	harness.Output(t, m.Pilot("node", "install"))
	harness.Output(t, m.Pilot("node", "uninstall"))
	m.CheckFiles(before)
	if err := syscall.Unmount(m.Root+containerdConfig, 0); err != nil {
		t.Fatal(err)
	}
	if err := harness.Command(t, "chattr", "+i", m.Root+containerdConfig).Run(); err != nil {
		t.Logf("this file system has no immutable files: %v", err)
		return
	}
	defer harness.Command(t, "chattr", "-i", m.Root+containerdConfig).Run()
	before = m.Files()
	harness.ExpectFailure(t, m.Pilot("node", "install"), containerdConfig, "config.toml is immutable", "chattr -ia")
	m.CheckFiles(before)
}
