package encrypt

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// dev is a user without any rights, on a Debian 13 with skopeo and podman. Its
// containers are rootless.
type dev struct {
	t    testing.TB
	root string
}

const (
	devUID  = 54322
	devHome = "/home/dev"
)

// newDev makes the user and the machine. Commands see dir at its own path.
func newDev(t testing.TB, dir string) *dev {
	t.Helper()
	d := harness.NewDebian(t, dir, "")
	harness.Output(t, exec.Command("cp", filepath.Join(harness.Bin, "copilot"), filepath.Join(d.Root, "usr/local/bin/copilot")))
	passwd := filepath.Join(d.Root, "etc/passwd")
	if err := os.WriteFile(passwd, []byte(harness.Read(t, passwd)+fmt.Sprintf("dev:x:%d:%[1]d::%s:/bin/sh\n", devUID, devHome)), 0o644); err != nil {
		t.Fatal(err)
	}
	u := &dev{t, d.Root}
	u.write(".config/containers/storage.conf", "[storage]\ndriver = \"vfs\"\n[storage.options]\nignore_chown_errors = \"true\"\n")
	for _, name := range []string{"run/user/54322", "old"} {
		if err := os.MkdirAll(filepath.Join(d.Root, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	harness.Output(t, exec.Command("chown", "-R", "54322:54322", d.Root+"/run/user/54322"))
	t.Cleanup(func() {
		// podman leaves a process that holds its namespaces, and the machine's mounts with them.
		if pid, err := strconv.Atoi(strings.TrimSpace(harness.Read(t, d.Root+"/run/user/54322/libpod/tmp/pause.pid"))); err != nil || syscall.Kill(pid, syscall.SIGKILL) != nil {
			t.Errorf("podman's process %d: %v", pid, err)
		}
	})
	return u
}

// write writes a file of the user's, in its home directory.
func (d *dev) write(name, content string) string {
	d.t.Helper()
	harness.Write(d.t, filepath.Join(d.root, devHome, name), content)
	harness.Output(d.t, exec.Command("chown", "-R", "54322:54322", d.root+devHome))
	return filepath.Join(devHome, name)
}

// run returns a command of the user. In a chroot there are no user namespaces, which
// rootless containers need, so the machine's root becomes the root.
func (d *dev) run(ocicrypt, name string, args ...string) *exec.Cmd {
	d.t.Helper()
	const enter = `set -e; cd "$0"; pivot_root . old; cd /; umount -l /old
exec setpriv --reuid 54322 --regid 54322 --clear-groups --no-new-privs "$@"`
	cmd := harness.Command(d.t, "unshare", append([]string{"--mount", "--propagation", "private", "sh", "-c", enter, d.root, name}, args...)...)
	cmd.Env = []string{"PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + devHome, "USER=dev", "XDG_RUNTIME_DIR=/run/user/54322", "OCICRYPT_KEYPROVIDER_CONFIG=" + ocicrypt}
	return cmd
}

// TestOtherUsers does, as a user without rights, what docs/encrypting.md has for one.
func TestOtherUsers(t *testing.T) {
	t.Parallel()
	b := harness.NewTLSBroker(t, "team-a")
	dir := harness.TempDir(t)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	_, daemon := harness.StartPilot(t, dir+"/daemon", "unix://"+b.Dir+"/copilot.sock")
	registry, _ := harness.StartRegistry(t, dir)
	d := newDev(t, dir)
	conf := func(name string, args ...string) string {
		cert, key := b.Enroll(t, name, args...)
		d.write(name+"/cert.pem", harness.Read(t, cert))
		d.write(name+"/key.pem", harness.Read(t, key))
		d.write(name+"/ca.pem", harness.Read(t, b.Dir+"/ca.pem"))
		in := devHome + "/" + name
		toml := d.write(name+"/pilot.toml", fmt.Sprintf("broker = %q\nbroker-ca = \"%s/ca.pem\"\nbroker-cert = \"%[2]s/cert.pem\"\nbroker-key = \"%[2]s/key.pem\"\n", b.URL(), in))
		return d.write(name+"/ocicrypt.conf", fmt.Sprintf(`{"key-providers": {"pilot": {"cmd": {"path": "/usr/local/bin/pilot", "args": ["keyprovider", "--config", %q]}}}}`, toml))
	}
	ci, node := conf("builder", "--role", "ci"), conf("laptop")
	secret := harness.NewSecret()
	l := harness.NewLayout(t)
	l.Write(dir+"/plain", "v1", l.Image(harness.LayerKinds[0], false, harness.Arch, secret))
	harness.Output(t, exec.Command("chmod", "-R", "a+rX", dir+"/plain"))
	ours := registry + "/app:v1"

	// A CI machine encrypts, and a laptop without root decrypts.
	harness.Output(t, d.run(ci, "skopeo", "copy", "--dest-tls-verify=false", "--encryption-key", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", "docker://"+ours))
	harness.ExpectFailure(t, d.run(ci, "skopeo", "copy", "--src-tls-verify=false", "--decryption-key", "provider:pilot:team-a", "docker://"+ours, "oci:"+devHome+"/no:v1"), "not allowed")
	harness.Output(t, d.run(node, "skopeo", "copy", "--src-tls-verify=false", "--decryption-key", "provider:pilot:team-a", "docker://"+ours, "oci:"+devHome+"/decrypted:v1"))
	if !strings.Contains(blobs(t, d.root+devHome+"/decrypted"), secret) {
		t.Error("the secret is not in what skopeo decrypted")
	}
	harness.Output(t, d.run(node, "podman", "pull", "-q", "--tls-verify=false", "--decryption-key", "provider:pilot:team-a", ours))
	harness.Output(t, d.run(ci, "podman", "push", "-q", "--tls-verify=false", "--encryption-key", "provider:pilot:team-a", ours, registry+"/app:v2"))
	harness.Output(t, d.run(node, "ctr-pilot", "images", "rewrap", "--registry", "--plain-http", "--dry-run", registry+"/app:v2"))

	// A denial by the broker has an exit status of its own, through the executable.
	rotate := d.run(ci, "ctr-pilot", "images", "rewrap", "--registry", "--plain-http", registry+"/app:v2")
	harness.ExpectFailure(t, rotate, "not allowed")
	if status := rotate.ProcessState.ExitCode(); status != 3 {
		t.Errorf("rewrap without a right: exit status %d", status)
	}

	// A socket that only root can use is an error that says what to do, once.
	own := "name pilot as a cmd in their ocicrypt.conf, with a pilot.toml of their own"
	forwarding := d.write("forwarding.conf", fmt.Sprintf(`{"key-providers": {"pilot": {"cmd": {"path": "/usr/local/bin/pilot", "args": ["keyprovider", "--daemon", "unix://%s/daemon/keyprovider.sock"]}}}}`, dir))
	harness.Output(t, exec.Command("chmod", "a+rx", dir+"/daemon"))
	harness.Output(t, exec.Command("chmod", "a+r", daemon))
	harness.ExpectFailure(t, d.run(forwarding, "skopeo", "copy", "--encryption-key", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", "oci:"+devHome+"/x:v1"), "permission denied: other users", own)
	harness.ExpectFailure(t, d.run(daemon, "ctr-pilot", "images", "rewrap", "--registry", "--plain-http", ours), "permission denied: other users", own)
	harness.ExpectFailure(t, d.run(daemon, "skopeo", "copy", "--encryption-key", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", "oci:"+devHome+"/x:v1"), "permission denied") // skopeo's own
	foreign := harness.Write(t, d.root+"/etc/pilot/pilot.toml", fmt.Sprintf("broker = %q\nbroker-cert = \"/etc/pilot/cert.pem\"\nbroker-key = \"/etc/pilot/key.pem\"\n", b.URL()))
	cert, key := b.Enroll(t, "worker-7")
	harness.Write(t, d.root+"/etc/pilot/cert.pem", harness.Read(t, cert))
	harness.Write(t, d.root+"/etc/pilot/key.pem", harness.Read(t, key))
	harness.Output(t, exec.Command("chmod", "a+r", foreign, d.root+"/etc/pilot/cert.pem"))
	request := d.run("", "pilot", "keyprovider")
	request.Stdin = strings.NewReader(`{"op":"keyunwrap"}`)
	harness.ExpectFailure(t, request, "/etc/pilot/key.pem: permission denied", "run this as root, or give this user a pilot.toml with a certificate and key of its own")

	harness.Output(t, exec.Command("chmod", "a+rx", b.Dir))
	d2 := &harness.Debian{T: t, Root: d.root, Ocicrypt: ""}
	harness.Output(t, d2.Run("cp", "-a", "/usr/local/bin/copilot", "/usr/local/bin/again")) // the machine still works
	store := d.root + "/var/lib/copilot"
	if err := os.MkdirAll(store, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"keks.db", "master.key", "audit.log"} {
		harness.Write(t, store+"/"+name, "x")
	}
	hint := "run this as root, or as the user that copilot runs as (sudo -u copilot copilot …)"
	for _, mode := range []os.FileMode{0o700, 0o755} {
		if err := os.Chmod(store, mode); err != nil {
			t.Fatal(err)
		}
		for _, args := range [][]string{{"keys", "list"}, {"keys", "create", "x"}, {"keys", "check", "team-a"}, {"audit", "verify"}} {
			cmd := d.run("", "copilot", args...)
			if out := harness.ExpectFailure(t, cmd, "permission denied: "+hint); strings.Count(out, "permission denied") != 1 || strings.Count(out, "\n") != 1 {
				t.Errorf("%s: %s", args, out)
			}
			if status := cmd.ProcessState.ExitCode(); status != 1 {
				t.Errorf("%s: exit status %d", args, status)
			}
		}
	}
}
