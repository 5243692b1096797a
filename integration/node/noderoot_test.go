package node

import (
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"golang.org/x/sys/unix"
)

// sandboxes are the modes in which pilot confines a root's programs, with the command that
// runs pilot so and the programs' user. Without user namespaces and CAP_SYS_ADMIN, as in
// most containers, there is none.
var sandboxes = map[string]struct {
	prefix []string
	mounts bool   // the root has the machine's /proc and /dev
	may    uint32 // capabilities in a user namespace
}{
	"user":           {may: 1 << unix.CAP_DAC_READ_SEARCH},
	"user namespace": {mounts: true, may: 1 << unix.CAP_DAC_READ_SEARCH},
	"no user namespaces": {prefix: []string{"unshare", "--user", "--map-root-user", "sh", "-c",
		`echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"`, "sh"}},
}

// container runs a command as in an ordinary container: as root, without CAP_SYS_ADMIN
// and user namespaces.
var container = []string{"unshare", "--user", "--map-root-user", "sh", "-c",
	`echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin "$@"`, "sh"}

// TestHostileRootIsContained sets up root directories with a malicious containerd.
func TestHostileRootIsContained(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	hostile := filepath.Join(dir, "containerd")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", hostile, "./integration/testdata/hostileroot")
	build.Dir, build.Env = harness.Repo, append(os.Environ(), "CGO_ENABLED=0")
	harness.Output(t, build)
	const secret = "the-token-of-the-CI-job"
	outside := filepath.Join(dir, "outside")
	harness.Write(t, outside+"/secret", secret)
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tcp.Close() })
	abstract, err := net.Listen("unix", "@"+secret)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { abstract.Close() })
	for name, s := range sandboxes {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			root := plainRoot(t, hostile)
			daemon := "daemon-" + root // not that of another sandbox, which may still run
			if s.mounts {
				m := &harness.Machine{T: t, Root: root}
				m.Mount("/proc", "proc", "", syscall.MS_BIND|syscall.MS_REC, "")
				m.Mount("/dev", "dev", "", syscall.MS_BIND|syscall.MS_REC, "")
			}
			if err := syscall.Mknod(root+"/disk", syscall.S_IFBLK|0o666, int(unix.Mkdev(7, 250))); err != nil {
				t.Fatal(err)
			}
			install := func(do string, more ...string) string {
				t.Helper()
				attack, err := json.Marshal(map[string]any{"Do": do, "Port": port(tcp), "Secret": secret, "Outside": outside, "Capabilities": s.may, "Daemon": daemon})
				if err != nil {
					t.Fatal(err)
				}
				harness.Write(t, root+"/attack", string(attack))
				args := slices.Concat(s.prefix, []string{filepath.Join(harness.Bin, "pilot"), "node", "install", "--root", root}, more)
				cmd := harness.Command(t, args[0], args[1:]...)
				cmd.Env = append(os.Environ(), "CI_TOKEN="+secret)
				file, err := os.Open(outside + "/secret")
				if err != nil {
					t.Fatal(err)
				}
				defer file.Close()
				cmd.ExtraFiles = []*os.File{file} // which it inherits
				return harness.CombinedOutput(t, cmd)
			}
			harness.Write(t, root+"/attack", "")
			os.Chmod(root+"/attack", 0o600)
			before := listed(t, root)
			if out := install("report"); !strings.HasSuffix(out, "harm:\n") {
				t.Errorf("it could do harm: %s", out)
			}
			// It works without a sandbox, so the test would notice.
			if out := install("report", "--trust-root"); s.prefix == nil && (!strings.Contains(out, "connected, connected to an abstract socket") || !strings.Contains(out, "wrote /etc/written")) || strings.Contains(out, "environment") || s.may == 0 && strings.Contains(out, "capabilities") || strings.Contains(out, "open file") {
				t.Errorf("in a bare chroot: %s", out)
			}
			for _, name := range []string{"written", "etc/written", "tmp/written", "dev/written"} {
				os.Remove(filepath.Join(root, name))
			}
			os.Chmod(root+"/attack", 0o600)
			if out := install("daemon"); !strings.HasSuffix(out, "started\n") {
				t.Errorf("daemon: %s", out)
			}
			if left := running(t, daemon); left != "" {
				t.Errorf("it left a process: %s", left)
			}
			if out := install("flood"); !strings.Contains(out, "printed more than 4 MiB") {
				t.Errorf("flood: %.1000s", out)
			}
			if out := install("hang"); !strings.Contains(out, "was stopped: context deadline exceeded") {
				t.Errorf("hang: %s", out)
			}
			if after := listed(t, root); !slices.Equal(after, before) {
				t.Errorf("it changed files: %q, were %q", after, before)
			}
		})
	}
}

// TestRootInSandbox sets up a root with a real containerd in each sandbox, and where none
// is possible.
func TestRootInSandbox(t *testing.T) {
	t.Parallel()
	containerd := filepath.Join(harness.Tools, "bin/containerd")
	for name, s := range sandboxes {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			root := plainRoot(t, containerd)
			harness.Write(t, root+"/etc/containerd/config.toml", "version = 3\n")
			os.Chmod(root+"/etc/containerd/config.toml", 0o600)
			if s.prefix == nil { // with a user namespace any user's file can be read
				os.Chown(root+"/etc/containerd/config.toml", 1000, 33)
			}
			if s.mounts {
				m := &harness.Machine{T: t, Root: root}
				m.Mount("proc", "proc", "proc", 0, "")
			}
			args := slices.Concat(s.prefix, []string{filepath.Join(harness.Bin, "pilot"), "node", "install", "--root", root})
			if out := harness.Output(t, harness.Command(t, args[0], args[1:]...)); !strings.Contains(out, "wrote /etc/containerd/conf.d/pilot.toml") {
				t.Error(out)
			}
			args = slices.Concat(s.prefix, []string{filepath.Join(harness.Bin, "pilot"), "node", "uninstall", "--root", root})
			if out := harness.Output(t, harness.Command(t, args[0], args[1:]...)); !strings.Contains(out, "as it was before") {
				t.Error(out)
			}
		})
	}
	t.Run("container", func(t *testing.T) {
		t.Parallel()
		root := plainRoot(t, containerd)
		before := listed(t, root)
		args := append(slices.Clone(container), filepath.Join(harness.Bin, "pilot"), "node", "install", "--root", root)
		harness.ExpectFailure(t, harness.Command(t, args[0], args[1:]...), "no sandbox can be made", "CAP_SYS_ADMIN", "--trust-root")
		if after := listed(t, root); !slices.Equal(after, before) {
			t.Errorf("files: %q, were %q", after, before)
		}
		args = append(args, "--trust-root")
		if out := harness.Output(t, harness.Command(t, args[0], args[1:]...)); !strings.Contains(out, "wrote /etc/containerd/conf.d/pilot.toml") {
			t.Error(out)
		}
	})
}

// plainRoot makes a root directory in the test's directory, with pilot and a program as
// its containerd.
func plainRoot(t *testing.T, containerd string) string {
	t.Helper()
	root := filepath.Join(harness.TempDir(t), "root")
	for _, d := range []string{"etc", "tmp", "dev", "proc", "usr/local/bin", "usr/bin"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	harness.Output(t, harness.Command(t, "install", containerd, filepath.Join(root, "usr/bin/containerd")))
	libraries, _ := exec.CommandContext(t.Context(), "ldd", containerd).Output() // none for a static one
	for _, file := range regexp.MustCompile(`/\S+`).FindAllString(string(libraries), -1) {
		harness.Output(t, harness.Command(t, "install", "-D", file, filepath.Join(root, file)))
	}
	harness.Output(t, harness.Command(t, "install", filepath.Join(harness.Bin, "pilot"), filepath.Join(root, "usr/local/bin/pilot")))
	return root
}

// listed returns the files of a root with their modes.
func listed(t *testing.T, root string) []string {
	t.Helper()
	return strings.Split(harness.Output(t, harness.Command(t, "find", root, "-xdev", "-printf", `%P %M\n`)), "\n")
}

// running returns the command line of a process with that argument, or "".
func running(t *testing.T, argument string) string {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if line, err := os.ReadFile(f); err == nil && slices.Contains(strings.Split(string(line), "\x00"), argument) {
			return string(line)
		}
	}
	return ""
}

func port(l net.Listener) string {
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}
