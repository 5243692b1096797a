//go:build wine

package wine

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// windows is a Windows machine with our programs.
type windows struct {
	*harness.Machine
	t      testing.TB
	drive  string // the directory that is C: there
	broker *harness.TLSBroker
}

// bareWindows makes a machine without our programs.
func bareWindows(t *testing.T) *windows {
	w := &windows{Machine: harness.BareMachine(t, filepath.Join(harness.Tools, "wine")), t: t}
	w.drive = filepath.Join(w.Root, "root/.wine/drive_c")
	harness.Output(t, w.run("wineboot", "--init"))
	t.Cleanup(func() {
		kill := exec.Command("chroot", w.Root, "wineserver", "--kill", "--wait")
		kill.Env = environment
		kill.Run()
	})
	return w
}

// newWindows makes a machine with a broker, of which %AppData% has the configuration.
func newWindows(t *testing.T) *windows {
	w := bareWindows(t)
	for _, name := range []string{"pilot", "copilot", "ctr-pilot"} {
		harness.Output(t, harness.Command(t, "install", "-D", filepath.Join(programs, name+".exe"), filepath.Join(w.drive, "pilot", name+".exe")))
	}
	w.broker = harness.NewTLSBroker(t, "team-a", "team-b")
	w.broker.Enroll(t, "laptop")
	w.broker.Enroll(t, "builder", "--role", "ci")
	harness.Output(t, harness.Command(t, "cp", "-r", w.broker.Dir, filepath.Join(w.drive, "certs")))
	conf := filepath.Join(w.drive, "users/root/AppData/Roaming/pilot")
	// As Notepad writes it, with a byte order mark.
	harness.Write(t, conf+"/pilot.toml", "\ufeff"+strings.Join([]string{
		`broker = "` + w.broker.URL() + `"`, `broker-ca = 'C:\certs\ca.pem'`, `broker-cert = 'C:\certs\laptop.pem'`, `broker-key = 'C:\certs\laptop-key.pem'`, "",
	}, "\r\n"))
	harness.Write(t, conf+"/ocicrypt.conf", "\ufeff"+`{"key-providers": {"pilot": {"cmd": {"path": "C:\\pilot\\pilot.exe", "args": ["keyprovider"]}}}}`+"\r\n")
	return w
}

var environment = []string{"PATH=/usr/bin:/bin", "HOME=/root", "XDG_RUNTIME_DIR=/tmp", "WINEDEBUG=-all", "WINEDLLOVERRIDES=mscoree,mshtml=", "DISPLAY="}

func (w *windows) run(name string, args ...string) *exec.Cmd {
	w.t.Helper()
	cmd := harness.Command(w.t, "chroot", append([]string{w.Root, name}, args...)...)
	cmd.Env = environment
	return cmd
}

func (w *windows) images(args ...string) *exec.Cmd {
	w.t.Helper()
	return w.run("wine", append([]string{`C:\pilot\ctr-pilot.exe`, "images"}, args...)...)
}

func (w *windows) copilot(args ...string) *exec.Cmd {
	w.t.Helper()
	return w.run("wine", append([]string{`C:\pilot\copilot.exe`}, args...)...)
}

// names returns the names in a layout.
func (w *windows) names(layout string) (list []string) {
	w.t.Helper()
	var index struct {
		Manifests []struct{ Annotations map[string]string }
	}
	b, err := os.ReadFile(filepath.Join(w.drive, layout, "index.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := errors.Join(err, json.Unmarshal(b, &index)); err != nil {
		w.t.Fatal(err)
	}
	for _, m := range index.Manifests {
		list = append(list, m.Annotations["org.opencontainers.image.ref.name"])
	}
	return list
}

// status returns the exit status of a command.
func status(t *testing.T, cmd *exec.Cmd) (int, string) {
	t.Helper()
	out, err := cmd.CombinedOutput()
	if e := new(exec.ExitError); err != nil && !errors.As(err, &e) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

const (
	recipient = "provider:pilot:team-a"
	plain     = `oci:C:\images\plain:v1`
)

func TestWindowsClients(t *testing.T) {
	t.Parallel()
	w := newWindows(t)
	l := harness.NewLayout(t)
	secret := harness.NewSecret()
	l.Write(w.drive+"/images/plain", "v1", l.Image(harness.LayerKinds[0], false, harness.Arch, secret))
	long := strings.Repeat(`a-directory-with-a-long-name\`, 12)

	t.Run("images come back as they were", func(t *testing.T) {
		digest := ""
		for i, to := range []string{`oci:C:\images\enc:x`, `oci-archive:C:\images\enc.tar:x`, `oci:C:\images\` + long + `enc:x`, `oci:c:/images/slashes:registry.example.com:1`} {
			harness.Output(t, w.images("encrypt", "--recipient", recipient, plain, to))
			if info := harness.Output(t, w.images("layerinfo", "--require-encrypted", to)); strings.Count(info, "team-a@1") != 2 {
				t.Errorf("%s: %s", to, info)
			}
			var back struct{ Digest string }
			if err := json.Unmarshal([]byte(harness.Output(t, w.images("decrypt", "--json", to, fmt.Sprintf(`oci:C:\images\back:%d`, i)))), &back); err != nil {
				t.Fatal(err)
			}
			if digest == "" {
				digest = back.Digest
			}
			if back.Digest != digest || !strings.Contains(harness.Read(t, w.drive+"/images/plain/index.json"), digest) {
				t.Errorf("%s came back as %s", to, back.Digest)
			}
		}
		if !harness.ContainsText(t, w.drive+"/images/back", secret) {
			t.Error("the secret is not in what was decrypted")
		}
		if harness.ContainsText(t, w.drive+"/images/enc", secret) || strings.Contains(harness.Read(t, w.drive+"/images/enc.tar"), secret) {
			t.Error("the secret is in what was encrypted")
		}
	})
	t.Run("Linux decrypts what Windows encrypted", func(t *testing.T) {
		dir := harness.TempDir(t)
		conf := harness.Write(t, dir+"/ocicrypt.conf", fmt.Sprintf(`{"key-providers": {"pilot": {"cmd": {"path": "%s/pilot", "args": ["keyprovider", "--broker", "%s",
			"--broker-ca", "%[3]s/ca.pem", "--broker-cert", "%[3]s/laptop.pem", "--broker-key", "%[3]s/laptop-key.pem"]}}}}`, harness.Bin, w.broker.URL(), w.broker.Dir))
		cmd := harness.Command(t, "ctr-pilot", "images", "decrypt", "oci:"+w.drive+"/images/enc:x", "oci:"+dir+"/back:x")
		cmd.Env = append(cmd.Environ(), "OCICRYPT_KEYPROVIDER_CONFIG="+conf)
		harness.Output(t, cmd)
		if !harness.ContainsText(t, dir+"/back", secret) {
			t.Error("the secret is not in what was decrypted")
		}
	})
	t.Run("an open archive is replaced", func(t *testing.T) {
		same := `oci-archive:C:\images\same.tar:v1`
		harness.Output(t, w.images("encrypt", "--recipient", recipient, plain, same))
		harness.Output(t, w.images("encrypt", "--recipient", "provider:pilot:team-b", same, same))
		if info := harness.Output(t, w.images("layerinfo", same)); strings.Count(info, "team-b@1") != 2 {
			t.Errorf("%s", info)
		}
		if left, _ := filepath.Glob(w.drive + "/images/.same*"); len(left) > 0 {
			t.Errorf("left: %s", left)
		}
	})
	t.Run("who may not decrypt is denied", func(t *testing.T) {
		cmd := w.images("decrypt", `oci:C:\images\enc:x`, `oci:C:\images\denied:x`)
		cmd.Env = append(cmd.Environ(), `PILOT_BROKER_CERT=C:\certs\builder.pem`, `PILOT_BROKER_KEY=C:\certs\builder-key.pem`)
		if code, out := status(t, cmd); code != 3 || !strings.Contains(out, "team-a") || len(w.names("images/denied")) > 0 {
			t.Errorf("status %d, names %q: %s", code, w.names("images/denied"), out)
		}
	})
	t.Run("names that do not fit say what does", func(t *testing.T) {
		for name, want := range map[string]string{"app:1": `"app:1" names an image in containerd: `, `C:\images\plain:v1`: `as in oci:C:\images\plain:v1`} {
			harness.ExpectFailure(t, w.images("encrypt", "--recipient", recipient, name, `oci:C:\images\none:x`), want)
		}
		for _, args := range [][]string{{`C:\pilot\pilot.exe`, "node", "install", "--now"}, {`C:\pilot\copilot.exe`, "serve", "--listen", "x"}} {
			if code, out := status(t, w.run("wine", args...)); code != 2 || !strings.Contains(out, "works on Linux only") {
				t.Errorf("%s: %d, %s", args, code, out)
			}
		}
	})
	t.Run("runs at once name all their images", func(t *testing.T) {
		const runs = 4
		errs := make(chan error, runs)
		for i := range runs {
			cmd := w.images("encrypt", "--recipient", recipient, plain, fmt.Sprintf(`oci:C:\images\many:%d`, i))
			go func() {
				out, err := cmd.CombinedOutput()
				if err != nil {
					err = fmt.Errorf("%w: %s", err, out)
				}
				errs <- err
			}()
		}
		for range runs {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		if names := w.names("images/many"); len(names) != runs {
			t.Errorf("%q", names)
		}
	})
	t.Run("Ctrl-C leaves no image", func(t *testing.T) {
		resume := w.broker.Process.Pause(t)
		defer resume()
		cmd := w.images("encrypt", "--recipient", recipient, plain, `oci:C:\images\stopped:x`)
		p := harness.Start(t, harness.TempDir(t), "ctr-pilot", cmd)
		// pilot waits for the broker.
		harness.Await(t, "pilot.exe", func() error { return running("pilot.exe keyprovider") })
		p.Cmd.Process.Signal(syscall.SIGINT)
		<-p.Done
		if code := p.Cmd.ProcessState.ExitCode(); code != 1 || len(w.names("images/stopped")) > 0 {
			t.Errorf("status %d, names %q: %s", code, w.names("images/stopped"), harness.Read(t, p.Log))
		}
	})
	t.Run("a daemon on a loopback address is a key provider", func(t *testing.T) {
		address := loopbacktest.FreeAddress(t)
		harness.Write(t, w.drive+"/grpc.conf", `{"key-providers": {"pilot": {"grpc": "`+address+`"}}}`)
		serve := w.run("wine", `C:\pilot\pilot.exe`, "serve", "--listen", address, "--insecure-loopback")
		p := harness.Start(t, harness.TempDir(t), "pilot", serve)
		harness.Await(t, "pilot serve", harness.Listening(address))
		cmd := w.images("encrypt", "--recipient", recipient, plain, `oci:C:\images\daemon:x`)
		cmd.Env = append(cmd.Environ(), `OCICRYPT_KEYPROVIDER_CONFIG=C:\grpc.conf`)
		harness.Output(t, cmd)
		if info := harness.Output(t, w.images("layerinfo", `oci:C:\images\daemon:x`)); strings.Count(info, "team-a@1") != 2 {
			t.Errorf("%s", info)
		}
		p.Cmd.Process.Signal(syscall.SIGINT) // Ctrl-C
		<-p.Done
		if code := p.Cmd.ProcessState.ExitCode(); code != 0 {
			t.Errorf("it ends with status %d", code)
		}
		for _, args := range [][]string{{}, {"--listen", "unix:///C:/pilot.sock"}, {"--listen", address, "--insecure-loopback", "--diff-listen", "unix:///x"}} {
			if code, out := status(t, w.run("wine", append([]string{`C:\pilot\pilot.exe`, "serve"}, args...)...)); code != 2 {
				t.Errorf("%s: %d, %s", args, code, out)
			}
		}
	})
	t.Run("copilot's client commands", func(t *testing.T) {
		server := []string{"--server", w.broker.URL(), "--ca", `C:\certs\ca.pem`, "--cert", `C:\certs\admin.pem`, "--key", `C:\certs\admin-key.pem`}
		if out := harness.Output(t, w.copilot(append([]string{"keys", "list"}, server...)...)); !strings.Contains(out, "team-a") || !strings.Contains(out, "team-b") {
			t.Errorf("%s", out)
		}
		harness.ExpectFailure(t, w.copilot("keys", "list"), "name the broker with --server")
		const node = "spiffe://example.com/node/worker-7"
		check := append([]string{"policy", "check", "--policy", `C:\certs\policy.toml`}, server...)
		if out := harness.Output(t, w.copilot(append(check, node, "team-a", "unwrap")...)); !strings.HasPrefix(out, "allowed") {
			t.Errorf("%s", out)
		}
		harness.Output(t, w.copilot(append(append([]string{"keys", "revoke"}, server...), "--identity", node, "team-a")...))
		if code, out := status(t, w.copilot(append(check, node, "team-a", "unwrap")...)); code != 3 || !strings.Contains(out, "revoked") {
			t.Errorf("%d, %s", code, out)
		}
		// With a copy of the log and of the master key.
		harness.Output(t, harness.Command(t, "cp", "-r", w.broker.Dir+"/store", w.drive+"/store"))
		verify := []string{"audit", "verify", "--dir", `C:\store`, `C:\store\audit.log`}
		if out := harness.Output(t, w.copilot(verify...)); !strings.Contains(out, "none changed or missing") {
			t.Errorf("%s", out)
		}
		if err := os.Chmod(w.drive+"/store/master.key", 0o644); err != nil {
			t.Fatal(err)
		}
		harness.ExpectFailure(t, w.copilot(verify...), "can be read by", "icacls")
	})
}

// running returns an error unless a process with this in its command line is there.
func running(what string) error {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	for _, name := range files {
		if b, err := os.ReadFile(name); err == nil && strings.Contains(strings.ReplaceAll(string(b), "\x00", " "), what) {
			return nil
		}
	}
	return errors.New("it does not run")
}
