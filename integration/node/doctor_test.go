package node

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// older is in the doctor's detail if containerd was not restarted since its configuration
// was written.
const older = "config.toml was written at"

// expectOK checks that all steps are ok, except those that are named, which are skipped.
func expectOK(t testing.TB, r harness.DoctorReport, skipped ...string) {
	t.Helper()
	for _, s := range r.Steps {
		want := "ok"
		if slices.Contains(skipped, s.Name) {
			want = "skipped"
		}
		if s.Result != want {
			t.Errorf("%s is %s: %s", s.Name, s.Result, s.Detail)
		}
	}
	if !r.OK || len(r.Steps) != 8 {
		t.Errorf("%d steps, ok: %v", len(r.Steps), r.OK)
	}
}

func expectSkipped(t testing.TB, r harness.DoctorReport, steps ...string) {
	t.Helper()
	for _, s := range r.Steps {
		if (s.Result == "skipped") != slices.Contains(steps, s.Name) {
			t.Errorf("%s is %s: %s", s.Name, s.Result, s.Detail)
		}
	}
}

// TestDoctor examines machines that work, and that don't.
func TestDoctor(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.JWE)
	for _, v := range []harness.ContainerdVersion{harness.Containerd2(), harness.Containerd17(), harness.Containerd16()} {
		t.Run(v.Name, func(t *testing.T) {
			dir := harness.TempDir(t)
			brokerProcess, brokerURL := harness.StartBroker(t, dir+"/broker", "team-a", "team-b")
			pilotProcess, conf := harness.StartPilot(t, dir, brokerURL)
			var n *harness.Node
			transfer := []string{"transfer"}
			switch {
			case v.Name == "1.6":
				n = harness.NewNode(t, dir, v, conf, "")
			case v.Number > 2:
				transfer = nil
				fallthrough
			default:
				n = harness.NewDifferNode(t, dir, harness.DifferConfig{Containerd: v})
			}
			p := harness.NewDoctorNode(t, n)
			kek := []string{"--broker", brokerURL, "--kek", "team-a"}

			expectOK(t, p.Examine(t, kek...), transfer...)
			native := p.Examine(t, "--broker", brokerURL, "--default-keks", "team-b,team-a", "--snapshotter", "native")
			if v.Number > 2 {
				native.ExpectFailed(t, "containerd-config", "pilot node install --now", "the transfer service does not unpack for linux/"+harness.Arch+" and native with pilot")
			} else {
				expectOK(t, native, transfer...)
			}
			expectOK(t, p.Examine(t, "--broker", brokerURL), "broker", "transfer")
			several := p.Examine(t, "--broker", "unix:///nowhere.sock,"+brokerURL, "--kek", "team-a")
			expectOK(t, several, transfer...)
			if !strings.Contains(several.Output, "but copilot at unix:///nowhere.sock does not answer") {
				t.Errorf("one of two brokers is away:\n%s", several.Output)
			}
			out := harness.Output(t, p.Command(t, kek...))
			if strings.Count(out, "ok ") != 8-len(transfer) {
				t.Errorf("as text:\n%s", out)
			}
			t.Log(out)

			r := p.Examine(t, append(kek, "--kek", "nobody")...)
			r.ExpectFailed(t, "broker", "on the broker's machine: copilot keys create nobody", `KEK "nobody"`, "no such KEK")
			expectSkipped(t, r, transfer...)
			expectSkipped(t, p.Examine(t, "--broker", brokerURL, "--kek", "nobody"), "transfer")

			// pilot has the KEK in its cache.
			brokerProcess.Stop(t)
			r = p.Examine(t, append(kek, "--broker-timeout", "1s")...)
			r.ExpectFailed(t, "broker", "on the broker's machine: systemctl restart copilot.service", `KEK "team-a"`, "copilot at "+brokerURL)
			r = p.Examine(t, append(kek, "--broker-timeout", "1s", "--kek", "team-c")...)
			r.ExpectFailed(t, "broker", "on the broker's machine: systemctl restart copilot.service", `KEK "team-c"`, "copilot at "+brokerURL)
			harness.StartBroker(t, dir+"/broker")

			pilotProcess.Stop(t)
			r = p.Examine(t, kek...)
			r.ExpectFailed(t, "key-provider", "systemctl start pilot.service", "does not exist")
			r.ExpectFailed(t, "differ", "systemctl start pilot.service", "does not exist")
			if v.Name == "1.6" {
				expectSkipped(t, r, "broker", "transfer")
			} else {
				expectSkipped(t, r, "broker", "layer", "transfer")
			}
			pilotProcess, _ = harness.StartPilot(t, dir, "unix:///nowhere.sock", "--broker-timeout", "1s")
			p.Examine(t, kek...).ExpectFailed(t, "broker", "systemctl restart pilot.service", "copilot at unix:///nowhere.sock", "the broker releases it with the settings in /dev/null")
			pilotProcess.Kill()
			p.Examine(t, kek...).ExpectFailed(t, "key-provider", "systemctl start pilot.service", "connection refused")
			harness.StartPilot(t, dir, brokerURL)
			expectOK(t, p.Examine(t, kek...), transfer...)

			n.Stop(t)
			r = p.Examine(t, kek...)
			r.ExpectFailed(t, "containerd", "systemctl restart containerd.service", "containerd.sock")
			expectSkipped(t, r, "containerd-config", "layer", "transfer", "workloads")
		})
	}
}

// TestDoctorConfiguration examines machines whose containerd is misconfigured, or was not
// restarted.
func TestDoctorConfiguration(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	_, brokerURL := harness.StartBroker(t, dir, "team-a")
	for _, v := range []harness.ContainerdVersion{harness.Containerd2(), harness.Containerd17(), harness.Containerd16()} {
		t.Run(v.Name, func(t *testing.T) {
			home := harness.TempDir(t)
			_, conf := harness.StartPilot(t, home, brokerURL)
			p := harness.NewDoctorNode(t, harness.StartNode(t, home, v, "", ""))
			file := filepath.Join(home, "config.toml")
			without := harness.Read(t, file)
			args := []string{"--broker", brokerURL, "--kek", "team-a"}

			r := p.Examine(t, args...)
			r.ExpectFailed(t, "containerd-config", "pilot node install --now", file)
			expectSkipped(t, r, "layer", "transfer")

			// The configuration is written, and containerd is not restarted.
			other := harness.TempDir(t)
			var with string
			if v.Name == "1.6" {
				harness.NewNode(t, other, v, conf, "")
			} else {
				harness.NewDifferNode(t, other, harness.DifferConfig{Containerd: v})
			}
			with = strings.ReplaceAll(harness.Read(t, other+"/config.toml"), other, home)
			harness.Write(t, file, with)
			r = p.Examine(t, args...)
			if v.Name == "1.6" {
				r.ExpectFailed(t, "layer", "systemctl restart containerd.service", "containerd did not ask pilot", older)
			} else {
				r.ExpectFailed(t, "containerd-config", "systemctl restart containerd.service", "has not loaded pilot's differ", older)
			}
			p.Stop(t)
			p.Start(t)
			transfer := []string{"transfer"}
			if v.Number > 2 {
				transfer = nil
			}
			expectOK(t, p.Examine(t, args...), transfer...)

			// containerd runs with settings that are no longer in the file.
			breaks := map[string][2]string{
				"[proxy_plugins.pilot]": {"there is no proxy plugin pilot", "[proxy_plugins.other]"},
				"['pilot', 'walking']":  {"pilot is not the first", "['walking', 'pilot']"},
				home + "/diff.sock'":    {"the proxy plugin pilot has the address /elsewhere.sock", "/elsewhere.sock'"},
				"  differ = 'pilot'":    {"the transfer service does not unpack for", "  differ = 'walking'"},
			}
			if v.Name == "1.6" {
				breaks = map[string][2]string{
					harness.Bin + "/pilot-decoder": {"can't be run", "/nowhere/pilot-decoder"},
					".tar+zstd+encrypted":          {"none of the stream processors that CRI uses accepts application/vnd.oci.image.layer.v1.tar+zstd+encrypted", ".other"},
					"  key_model = 'node'":         {`key_model of io.containerd.grpc.v1.cri is "", not node`, "  key_model = ''"},
				}
			}
			for old, b := range breaks {
				if strings.Contains(old, "differ = ") && v.Number < 3 {
					continue
				}
				harness.Write(t, file, strings.ReplaceAll(with, old, b[1]))
				p.Examine(t, args...).ExpectFailed(t, "containerd-config", "pilot node install --now", b[0], file)
			}
			harness.Write(t, file, with+"nonsense")
			p.Examine(t, args...).ExpectFailed(t, "containerd-config", "correct "+file, "would not start again")

			// The file can't be compared.
			harness.Write(t, file, with)
			r = p.Examine(t, append(args, "--containerd-binary", "/nowhere/containerd")...)
			if v.Name == "1.6" {
				expectOK(t, r, "containerd-config", "transfer")
			} else {
				expectOK(t, r, transfer...)
			}

			// pilot listens elsewhere than containerd expects.
			if v.Name != "1.6" {
				if err := os.Symlink(home+"/diff.sock", home+"/elsewhere.sock"); err != nil {
					t.Fatal(err)
				}
				p.Examine(t, append(args, "--diff-listen", "unix://"+home+"/elsewhere.sock")...).ExpectFailed(t, "containerd-config", "correct diff-listen in /dev/null",
					"containerd looks for pilot's differ at "+home+"/diff.sock", "diff-listen is "+home+"/elsewhere.sock")
				p.Examine(t, append(args, "--diff-listen", "off")...).ExpectFailed(t, "containerd-config", "correct diff-listen in /dev/null", "diff-listen is off")
			}
			harness.Write(t, file, without)
			p.Stop(t)
		})
	}
}

// TestDoctorRestart examines machines whose containerd has loaded the differ, but not the
// settings that make it use the differ.
func TestDoctorRestart(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	_, brokerURL := harness.StartBroker(t, dir, "team-a")
	for _, v := range []harness.ContainerdVersion{harness.Containerd2(), harness.Containerd17()} {
		home := harness.TempDir(t)
		harness.StartPilot(t, home, brokerURL)
		p := harness.NewDoctorNode(t, harness.StartNode(t, home, v, "", fmt.Sprintf("[proxy_plugins.pilot]\n  type = 'diff'\n  address = '%s/diff.sock'\n", home)))
		other := harness.NewDifferNode(t, harness.TempDir(t), harness.DifferConfig{Containerd: v})
		harness.Write(t, home+"/config.toml", strings.ReplaceAll(harness.Read(t, other.Dir+"/config.toml"), other.Dir, home))
		r := p.Examine(t, "--broker", brokerURL, "--kek", "team-a")
		r.ExpectFailed(t, "layer", "systemctl restart containerd.service", "containerd did not ask pilot", older)
		if v.Number > 2 {
			r.ExpectFailed(t, "transfer", "systemctl restart containerd.service", "containerd did not ask pilot", older)
		}
	}
}

// TestDoctorExaminesStreamProcessors examines machines that decrypt with stream processors.
func TestDoctorExaminesStreamProcessors(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	_, brokerURL := harness.StartBroker(t, dir, "team-a")
	for _, v := range []harness.ContainerdVersion{harness.Containerd2(), harness.Containerd17(), harness.Containerd16()} {
		home := harness.TempDir(t)
		_, conf := harness.StartPilot(t, home, brokerURL, "--diff-listen", "off")
		p := harness.NewDoctorNode(t, harness.NewNode(t, home, v, conf, ""))
		args := []string{"--broker", brokerURL, "--kek", "team-a", "--diff-listen", "off"}
		expectOK(t, p.Examine(t, args...), "differ", "transfer")
		harness.Write(t, conf, "{}")
		p.Examine(t, args...).ExpectFailed(t, "layer", "pilot node install --now", `key provider "pilot" is not configured`)
	}
}

// TestDoctorExaminesTCPKeyProvider examines machines whose key provider listens on TCP: one that writes the
// original's annotations, and one that requires certificates.
func TestDoctorExaminesTCPKeyProvider(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.Original)
	dir := harness.TempDir(t)
	_, brokerURL := harness.StartBroker(t, dir, "team-a", "team-b")
	listen := loopbacktest.FreeAddress(t)
	original := []string{"--listen", listen, "--insecure-loopback", "--annotation-format", "original", "--default-keks", "team-a", "--broker", brokerURL}
	harness.Start(t, dir, "pilot", exec.Command("pilot", append([]string{"serve", "--config", "/dev/null",
		"--diff-listen", "unix://" + dir + "/diff.sock", "--containerd", dir + "/containerd.sock", "--layer-record", dir + "/layers"}, original...)...))
	p := harness.NewDoctorNode(t, harness.NewDifferNode(t, dir, harness.DifferConfig{Containerd: harness.Containerd2()}))
	harness.Await(t, "pilot", harness.Listening(listen))
	expectOK(t, p.Examine(t, original...))
	// A pull does not say which KEK such an annotation needs.
	p.Examine(t, append(original, "--kek", "team-b")...).ExpectFailed(t, "broker", "journalctl -u pilot.service -n 30", `KEK "team-a"`, "does not unwrap")

	harness.Output(t, harness.Command(t, "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=pilot", "-keyout", dir+"/key.pem", "-out", dir+"/cert.pem"))
	expectOK(t, p.Examine(t, "--listen", listen, "--tls-cert", dir+"/cert.pem", "--tls-key", dir+"/key.pem", "--tls-client-ca", dir+"/cert.pem", "--kek", "team-a"), "key-provider", "broker", "transfer")
}

// TestDoctorBuiltin examines a machine whose containerd has the differ compiled in.
func TestDoctorBuiltin(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	v := harness.Containerd2()
	v.Command = []string{filepath.Join(dir, "bin/containerd")}
	harness.GoBuild(t, "integration/testdata/containerd", v.Command[0], ".")
	_, brokerURL := harness.StartBroker(t, dir+"/broker", "team-a")
	_, conf := harness.StartPilot(t, dir, brokerURL, "--diff-listen", "off")
	p := harness.NewDoctorNode(t, harness.StartNode(t, dir, v, "", fmt.Sprintf(`
[plugins.'io.containerd.differ.v1.pilot']
  key_providers = '%s'
[plugins.'io.containerd.service.v1.diff-service']
  default = ['pilot']
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = 'linux/%s'
  snapshotter = 'overlayfs'
  differ = 'pilot'
`, conf, harness.Arch)))
	expectOK(t, p.Examine(t, "--broker", brokerURL, "--kek", "team-a", "--diff-listen", "off"), "differ")
}

// TestDoctorHangs examines a machine whose programs accept connections and do not respond.
func TestDoctorHangs(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	brokerProcess, brokerURL := harness.StartBroker(t, dir+"/broker", "team-a")
	pilotProcess := harness.StartActivatedPilot(t, dir, brokerURL)
	n := harness.NewDifferNode(t, dir, harness.DifferConfig{Containerd: harness.Containerd2()})
	p := harness.NewDoctorNode(t, n)
	args := []string{"--broker", brokerURL, "--kek", "team-a"}
	begin := time.Now()
	expectOK(t, p.Examine(t, args...))
	whole := time.Since(begin)

	paused := func(stopped *harness.Process, f func()) {
		defer stopped.Pause(t)()
		f()
	}
	paused(pilotProcess, func() {
		r := p.Examine(t, args...)
		r.ExpectFailed(t, "key-provider", "systemctl restart pilot.service", "does not respond")
		r.ExpectFailed(t, "differ", "systemctl restart pilot.service", "does not respond")
		expectSkipped(t, r, "broker", "layer", "transfer")
	})
	paused(brokerProcess, func() {
		p.Examine(t, append(args, "--broker-timeout", "3s")...).ExpectFailed(t, "broker", "on the broker's machine: systemctl restart copilot.service", `KEK "team-a"`, "no response within")
	})
	paused(n.Process, func() {
		cmd := p.Command(t, args...)
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), "containerd does not answer") {
			t.Errorf("%v:\n%s", err, out)
		}
	})
	expectOK(t, p.Examine(t, args...))

	// systemd holds the sockets, and pilot does not start.
	pilotProcess.Stop(t)
	p.Examine(t, args...).ExpectFailed(t, "key-provider", "systemctl restart pilot.service", "does not respond")
	harness.StartActivatedPilot(t, dir, brokerURL)

	// Interrupted at any moment.
	for i := range 20 {
		cmd := p.Command(t, args...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(i) * whole / 20)
		cmd.Process.Signal(os.Interrupt)
		cmd.Wait()
		p.ExpectClean(t)
	}
	// Two at once.
	var both [2]*exec.Cmd
	for i := range both {
		both[i] = p.Command(t, args...)
		var out bytes.Buffer
		both[i].Stdout, both[i].Stderr = &out, &out
		if err := both[i].Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if t.Failed() {
				t.Log(out.String())
			}
		}()
	}
	for _, cmd := range both {
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
	p.ExpectClean(t)
}

// TestDoctorSockets examines sockets that other users may use, and sockets of other
// programs.
func TestDoctorSockets(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.JWE)
	dir := harness.TempDir(t)
	_, brokerURL := harness.StartBroker(t, dir+"/broker", "team-a")
	harness.StartPilot(t, dir, brokerURL)
	p := harness.NewDoctorNode(t, harness.NewDifferNode(t, dir, harness.DifferConfig{Containerd: harness.Containerd17()}))
	for _, step := range []struct{ name, socket, flag string }{{"key-provider", "keyprovider.sock", "--listen"}, {"differ", "diff.sock", "--diff-listen"}} {
		socket := filepath.Join(dir, step.socket)
		os.Chmod(socket, 0o666)
		p.Examine(t).ExpectFailed(t, step.name, "chmod 0600 "+socket, "every user")
		os.Chmod(socket, 0o660)
		if r := p.Examine(t); !strings.Contains(r.Output, "its group may use it") {
			t.Errorf("mode 0660:\n%s", r.Output)
		} else {
			expectOK(t, r, "broker", "transfer")
		}
		os.Chmod(socket, 0o600)
		p.Examine(t, step.flag, "unix://"+p.Socket).ExpectFailed(t, step.name, "ss -lp | grep "+p.Socket, "is not pilot's")
		file := harness.Write(t, dir+"/file", "")
		p.Examine(t, step.flag, "unix://"+file).ExpectFailed(t, step.name, "mv "+file+" "+file+".away", "is not a socket")
	}
	p.Examine(t, "--snapshotter", "nowhere").ExpectFailed(t, "layer", "journalctl -u containerd.service -u pilot.service -n 30", "snapshotter nowhere")
}

// TestDoctorRejectsInvalidConfiguration gives the doctor an invalid configuration.
func TestDoctorRejectsInvalidConfiguration(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	conf := harness.Write(t, dir+"/pilot.toml", "broker = 'unix:///b.sock'\nlisten = 'nowhere'\n")
	for want, args := range map[string][]string{
		conf + ":2: listen":              {"--config", conf},
		"broker-cert and":                {"--config", "/dev/null", "--broker-cert", "x"},
		"KEK id":                         {"--config", "/dev/null", "--kek", "a b"},
		"doctor takes one image at most": {"--config", "/dev/null", "right", "now"},
	} {
		cmd := harness.Command(t, "pilot", append([]string{"node", "doctor"}, args...)...)
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 2 || !strings.Contains(string(out), want) {
			t.Errorf("%v: %v, want %q in\n%s", args, err, want, out)
		}
	}
	out, err := harness.Command(t, "pilot", "node", "doctor", "--json", "--config", conf).Output()
	var r harness.DoctorReport
	if jsonErr := json.Unmarshal(out, &r); err == nil || jsonErr != nil {
		t.Fatal(err, jsonErr)
	}
	r.ExpectFailed(t, "configuration", "correct "+conf, fmt.Sprintf("%s:2: listen", conf))
	expectSkipped(t, r, "key-provider", "differ", "containerd", "containerd-config", "broker", "layer", "transfer", "workloads")
}
