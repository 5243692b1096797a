package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// patient is a machine that pilot node doctor examines.
type patient struct {
	*node
	program string // that runs its containerd
}

func newPatient(t testing.TB, n *node) *patient {
	t.Helper()
	// The doctor takes one program, and 1.7 here takes several words.
	quoted := `"` + strings.Join(n.command, `" "`) + `"`
	program := write(t, filepath.Join(n.dir, "containerd"), "#!/bin/sh\nexec "+quoted+` "$@"`+"\n")
	if err := os.Chmod(program, 0o700); err != nil {
		t.Fatal(err)
	}
	return &patient{n, program}
}

// older is what the doctor says of a containerd that was not restarted since its
// configuration was written.
const older = "config.toml was written at"

// report is what pilot node doctor --json prints.
type report struct {
	OK    bool
	Steps []struct {
		Name, Result, Detail string
		Mend                 []string
	}
	text string
}

// command returns the command that examines the machine.
func (p *patient) command(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	tmp := filepath.Join(p.dir, "tmp")
	if err := os.MkdirAll(tmp, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("pilot", append([]string{"node", "doctor", "--config", "/dev/null",
		"--listen", "unix://" + p.dir + "/keyprovider.sock", "--diff-listen", "unix://" + p.dir + "/diff.sock",
		"--containerd", p.socket, "--containerd-config", filepath.Join(p.dir, "config.toml"), "--containerd-binary", p.program}, args...)...)
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	return cmd
}

// examine has the doctor examine the machine, and checks that nothing is left
// of that.
func (p *patient) examine(t testing.TB, args ...string) report {
	t.Helper()
	cmd := p.command(t, append([]string{"--json"}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	begin := time.Now()
	out, err := cmd.Output()
	if took := time.Since(begin); took > patience {
		t.Errorf("it took %s", took)
	}
	status := cmd.ProcessState.ExitCode()
	r := report{text: string(out) + stderr.String()}
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatalf("%v in\n%s", err, r.text)
	}
	if want := map[bool]int{true: 0, false: 1}[r.OK]; status != want && status != 2 {
		t.Errorf("exit status %d, %v:\n%s", status, err, r.text)
	}
	p.clean(t)
	return r
}

// well checks that all steps are in order but those that are named, which are
// skipped.
func (r report) well(t testing.TB, skipped ...string) {
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

// ill checks that a step has failed, says each of said, and that mend is one of
// the commands that mend it.
func (r report) ill(t testing.TB, step, mend string, said ...string) {
	t.Helper()
	for _, s := range r.Steps {
		if s.Name != step {
			continue
		}
		if s.Result != "failed" || r.OK {
			t.Errorf("%s is %s", step, s.Result)
		}
		for _, w := range said {
			if !strings.Contains(s.Detail, w) {
				t.Errorf("%s: want %q in %q", step, w, s.Detail)
			}
		}
		if !slices.Contains(s.Mend, mend) {
			t.Errorf("%s: want %q among %q (%s)", step, mend, s.Mend, s.Detail)
		}
		return
	}
	t.Errorf("no step %s in\n%s", step, r.text)
}

func (r report) skipped(t testing.TB, steps ...string) {
	t.Helper()
	for _, s := range r.Steps {
		if (s.Result == "skipped") != slices.Contains(steps, s.Name) {
			t.Errorf("%s is %s: %s", s.Name, s.Result, s.Detail)
		}
	}
}

// clean checks that the doctor has left nothing on the machine, where nobody
// else has put anything.
func (p *patient) clean(t testing.TB) {
	t.Helper()
	if out, err := p.ctr("namespaces", "list", "--quiet").Output(); err == nil && strings.Contains(string(out), "pilot-doctor") {
		t.Errorf("left behind: namespace pilot-doctor")
	}
	for _, pattern := range []string{
		"tmp/*", "mounts/*", "root/io.containerd.content.v1.content/blobs/sha256/*", "root/io.containerd.content.v1.content/ingest/*",
		"root/io.containerd.snapshotter.v1.*/snapshots/*",
	} {
		await(t, "nothing left behind", func() error {
			left, err := filepath.Glob(filepath.Join(p.dir, pattern))
			if err == nil && len(left) > 0 {
				err = fmt.Errorf("there is %v", left)
			}
			return err
		})
	}
}

// TestDoctor examines machines in order, and out of order.
func TestDoctor(t *testing.T) {
	t.Parallel()
	for _, v := range []version{containerd2(), containerd17(), containerd16()} {
		t.Run(v.name, func(t *testing.T) {
			dir := tempDir(t)
			brokerProcess, brokerURL := broker(t, dir+"/broker", "team-a", "team-b")
			pilotProcess, conf := pilot(t, dir, brokerURL)
			var n *node
			transfer := []string{"transfer"}
			switch {
			case v.name == "1.6":
				n = newNode(t, dir, v, conf, "")
			case v.number > 2:
				transfer = nil
				fallthrough
			default:
				n = newDifferNode(t, dir, differNode{v: v})
			}
			p := newPatient(t, n)
			kek := []string{"--broker", brokerURL, "--kek", "team-a"}

			p.examine(t, kek...).well(t, transfer...)
			native := p.examine(t, "--broker", brokerURL, "--default-keks", "team-b,team-a", "--snapshotter", "native")
			if v.number > 2 {
				native.ill(t, "containerd-config", "pilot node install --now", "the transfer service does not unpack for linux/"+goarch+" and native with pilot")
			} else {
				native.well(t, transfer...)
			}
			p.examine(t, "--broker", brokerURL).well(t, "broker", "transfer")
			several := p.examine(t, "--broker", "unix:///nowhere.sock,"+brokerURL, "--kek", "team-a")
			several.well(t, transfer...)
			if !strings.Contains(several.text, "but copilot at unix:///nowhere.sock does not answer") {
				t.Errorf("one of two brokers is away:\n%s", several.text)
			}
			out := output(t, p.command(t, kek...))
			if strings.Count(out, "ok ") != 8-len(transfer) {
				t.Errorf("as text:\n%s", out)
			}
			t.Log(out)

			r := p.examine(t, append(kek, "--kek", "nobody")...)
			r.ill(t, "broker", "on the broker's machine: copilot keys create nobody", `KEK "nobody"`, "no such KEK")
			r.skipped(t, transfer...)
			p.examine(t, "--broker", brokerURL, "--kek", "nobody").skipped(t, "transfer")

			// pilot has the KEK in its cache.
			brokerProcess.stop(t)
			r = p.examine(t, append(kek, "--broker-timeout", "1s")...)
			r.ill(t, "broker", "on the broker's machine: systemctl restart copilot.service", `KEK "team-a"`, "copilot at "+brokerURL)
			r = p.examine(t, append(kek, "--broker-timeout", "1s", "--kek", "team-c")...)
			r.ill(t, "broker", "on the broker's machine: systemctl restart copilot.service", `KEK "team-c"`, "copilot at "+brokerURL)
			broker(t, dir+"/broker")

			pilotProcess.stop(t)
			r = p.examine(t, kek...)
			r.ill(t, "key-provider", "systemctl start pilot.service", "does not exist")
			r.ill(t, "differ", "systemctl start pilot.service", "does not exist")
			if v.name == "1.6" {
				r.skipped(t, "broker", "transfer")
			} else {
				r.skipped(t, "broker", "layer", "transfer")
			}
			pilotProcess, _ = pilot(t, dir, "unix:///nowhere.sock", "--broker-timeout", "1s")
			p.examine(t, kek...).ill(t, "broker", "systemctl restart pilot.service", "copilot at unix:///nowhere.sock", "with the settings of /dev/null the broker gives it")
			pilotProcess.kill()
			p.examine(t, kek...).ill(t, "key-provider", "systemctl start pilot.service", "connection refused")
			pilot(t, dir, brokerURL)
			p.examine(t, kek...).well(t, transfer...)

			n.stop(t)
			r = p.examine(t, kek...)
			r.ill(t, "containerd", "systemctl restart containerd.service", "containerd.sock")
			r.skipped(t, "containerd-config", "layer", "transfer")
		})
	}
}

// TestDoctorConfiguration examines machines whose containerd is configured
// wrongly, or was not restarted.
func TestDoctorConfiguration(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir, "team-a")
	for _, v := range []version{containerd2(), containerd17(), containerd16()} {
		t.Run(v.name, func(t *testing.T) {
			home := tempDir(t)
			_, conf := pilot(t, home, brokerURL)
			p := newPatient(t, startNode(t, home, v, "", ""))
			file := filepath.Join(home, "config.toml")
			without := read(t, file)
			args := []string{"--broker", brokerURL, "--kek", "team-a"}

			r := p.examine(t, args...)
			r.ill(t, "containerd-config", "pilot node install --now", file)
			r.skipped(t, "layer", "transfer")

			// The configuration is written, and containerd not restarted.
			other := tempDir(t)
			var with string
			if v.name == "1.6" {
				newNode(t, other, v, conf, "")
			} else {
				newDifferNode(t, other, differNode{v: v})
			}
			with = strings.ReplaceAll(read(t, other+"/config.toml"), other, home)
			write(t, file, with)
			r = p.examine(t, args...)
			if v.name == "1.6" {
				r.ill(t, "layer", "systemctl restart containerd.service", "containerd did not ask pilot", older)
			} else {
				r.ill(t, "containerd-config", "systemctl restart containerd.service", "has not loaded pilot's differ", older)
			}
			p.stop(t)
			p.start(t)
			transfer := []string{"transfer"}
			if v.number > 2 {
				transfer = nil
			}
			p.examine(t, args...).well(t, transfer...)

			// containerd runs with what is not in the file any more.
			breaks := map[string][2]string{
				"[proxy_plugins.pilot]": {"there is no proxy plugin pilot", "[proxy_plugins.other]"},
				"['pilot', 'walking']":  {"not pilot first", "['walking', 'pilot']"},
				home + "/diff.sock'":    {"the proxy plugin pilot is looked for at /elsewhere.sock", "/elsewhere.sock'"},
				"  differ = 'pilot'":    {"the transfer service does not unpack for", "  differ = 'walking'"},
			}
			if v.name == "1.6" {
				breaks = map[string][2]string{
					bin + "/pilot-decoder": {"can't be run", "/nowhere/pilot-decoder"},
					".tar+zstd+encrypted":  {"no stream processor that CRI knows accepts application/vnd.oci.image.layer.v1.tar+zstd+encrypted", ".other"},
					"  key_model = 'node'": {`key_model of io.containerd.grpc.v1.cri is "", not node`, "  key_model = ''"},
				}
			}
			for old, b := range breaks {
				if strings.Contains(old, "differ = ") && v.number < 3 {
					continue
				}
				write(t, file, strings.ReplaceAll(with, old, b[1]))
				p.examine(t, args...).ill(t, "containerd-config", "pilot node install --now", b[0], file)
			}
			write(t, file, with+"nonsense")
			p.examine(t, args...).ill(t, "containerd-config", "correct "+file, "would not start again")

			// It can't be compared.
			write(t, file, with)
			r = p.examine(t, append(args, "--containerd-binary", "/nowhere/containerd")...)
			if v.name == "1.6" {
				r.well(t, "containerd-config", "transfer")
			} else {
				r.well(t, transfer...)
			}

			// pilot is elsewhere than containerd looks for it.
			if v.name != "1.6" {
				if err := os.Symlink(home+"/diff.sock", home+"/elsewhere.sock"); err != nil {
					t.Fatal(err)
				}
				p.examine(t, append(args, "--diff-listen", "unix://"+home+"/elsewhere.sock")...).ill(t, "containerd-config", "correct diff-listen in /dev/null",
					"containerd looks for pilot's differ at "+home+"/diff.sock", "diff-listen is "+home+"/elsewhere.sock")
				p.examine(t, append(args, "--diff-listen", "off")...).ill(t, "containerd-config", "correct diff-listen in /dev/null", "diff-listen is off")
			}
			write(t, file, without)
			p.stop(t)
		})
	}
}

// TestDoctorRestart examines machines whose containerd has loaded the differ,
// and does not know yet that it is to ask it.
func TestDoctorRestart(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir, "team-a")
	for _, v := range []version{containerd2(), containerd17()} {
		home := tempDir(t)
		pilot(t, home, brokerURL)
		p := newPatient(t, startNode(t, home, v, "", fmt.Sprintf("[proxy_plugins.pilot]\n  type = 'diff'\n  address = '%s/diff.sock'\n", home)))
		other := newDifferNode(t, tempDir(t), differNode{v: v})
		write(t, home+"/config.toml", strings.ReplaceAll(read(t, other.dir+"/config.toml"), other.dir, home))
		r := p.examine(t, "--broker", brokerURL, "--kek", "team-a")
		r.ill(t, "layer", "systemctl restart containerd.service", "containerd did not ask pilot", older)
		if v.number > 2 {
			r.ill(t, "transfer", "systemctl restart containerd.service", "containerd did not ask pilot", older)
		}
	}
}

// TestDoctorProcessors examines machines that decrypt with stream processors.
func TestDoctorProcessors(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir, "team-a")
	for _, v := range []version{containerd2(), containerd17(), containerd16()} {
		home := tempDir(t)
		_, conf := pilot(t, home, brokerURL, "--diff-listen", "off")
		p := newPatient(t, newNode(t, home, v, conf, ""))
		args := []string{"--broker", brokerURL, "--kek", "team-a", "--diff-listen", "off"}
		p.examine(t, args...).well(t, "differ", "transfer")
		write(t, conf, "{}")
		p.examine(t, args...).ill(t, "layer", "pilot node install --now", `key provider "pilot" is not configured`)
	}
}

// TestDoctorTCP examines machines whose key provider answers over TCP: one that
// writes the original's annotations, and one that wants certificates.
func TestDoctorTCP(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir, "team-a", "team-b")
	listen := loopbacktest.FreeAddress(t)
	original := []string{"--listen", listen, "--insecure-loopback", "--annotation-format", "original", "--default-keks", "team-a", "--broker", brokerURL}
	start(t, dir, "pilot", exec.Command("pilot", append([]string{"serve", "--config", "/dev/null",
		"--diff-listen", "unix://" + dir + "/diff.sock", "--containerd", dir + "/containerd.sock"}, original...)...))
	p := newPatient(t, newDifferNode(t, dir, differNode{v: containerd2()}))
	await(t, "pilot", func() error {
		conn, err := net.Dial("tcp", listen)
		if err == nil {
			conn.Close()
		}
		return err
	})
	p.examine(t, original...).well(t)
	// On a pull nobody says which KEK an annotation like that takes.
	p.examine(t, append(original, "--kek", "team-b")...).ill(t, "broker", "journalctl -u pilot.service -n 30", `KEK "team-a"`, "does not unwrap")

	output(t, command(t, "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=pilot", "-keyout", dir+"/key.pem", "-out", dir+"/cert.pem"))
	p.examine(t, "--listen", listen, "--tls-cert", dir+"/cert.pem", "--tls-key", dir+"/key.pem", "--tls-client-ca", dir+"/cert.pem", "--kek", "team-a").
		well(t, "key-provider", "broker", "transfer")
}

// TestDoctorBuiltin examines a machine whose containerd has the differ compiled
// in.
func TestDoctorBuiltin(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	v := containerd2()
	v.command = []string{filepath.Join(dir, "bin/containerd")}
	build := exec.Command("go", "build", "-buildvcs=false", "-o", v.command[0], ".")
	build.Dir = filepath.Join(repo, "integration/testdata/containerd")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", build.Args, err, out)
	}
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	_, conf := pilot(t, dir, brokerURL, "--diff-listen", "off")
	p := newPatient(t, startNode(t, dir, v, "", fmt.Sprintf(`
[plugins.'io.containerd.differ.v1.pilot']
  key_providers = '%s'
[plugins.'io.containerd.service.v1.diff-service']
  default = ['pilot']
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = 'linux/%s'
  snapshotter = 'overlayfs'
  differ = 'pilot'
`, conf, goarch)))
	p.examine(t, "--broker", brokerURL, "--kek", "team-a", "--diff-listen", "off").well(t, "differ")
}

// TestDoctorHangs examines a machine whose programs take connections and do not
// answer.
func TestDoctorHangs(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	brokerProcess, brokerURL := broker(t, dir+"/broker", "team-a")
	pilotProcess := activated(t, dir, brokerURL)
	n := newDifferNode(t, dir, differNode{v: containerd2()})
	p := newPatient(t, n)
	args := []string{"--broker", brokerURL, "--kek", "team-a"}
	begin := time.Now()
	p.examine(t, args...).well(t)
	whole := time.Since(begin)

	paused := func(stopped *process, f func()) {
		defer stopped.pause(t)()
		f()
	}
	paused(pilotProcess, func() {
		r := p.examine(t, args...)
		r.ill(t, "key-provider", "systemctl restart pilot.service", "no answer comes")
		r.ill(t, "differ", "systemctl restart pilot.service", "no answer comes")
		r.skipped(t, "broker", "layer", "transfer")
	})
	paused(brokerProcess, func() {
		p.examine(t, append(args, "--broker-timeout", "3s")...).ill(t, "broker", "on the broker's machine: systemctl restart copilot.service", `KEK "team-a"`, "nothing came within")
	})
	paused(n.process, func() {
		cmd := p.command(t, args...)
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), "containerd does not answer") {
			t.Errorf("%v:\n%s", err, out)
		}
	})
	p.examine(t, args...).well(t)

	// systemd holds the sockets of a pilot that does not start.
	pilotProcess.stop(t)
	p.examine(t, args...).ill(t, "key-provider", "systemctl restart pilot.service", "no answer comes")
	activated(t, dir, brokerURL)

	// Interrupted at some moment of the examination.
	for i := range 20 {
		cmd := p.command(t, args...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(i) * whole / 20)
		cmd.Process.Signal(os.Interrupt)
		cmd.Wait()
		p.clean(t)
	}
	// Two at once.
	var both [2]*exec.Cmd
	for i := range both {
		both[i] = p.command(t, args...)
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
	p.clean(t)
}

// TestDoctorSockets looks at sockets that others may use, and that are not
// pilot's.
func TestDoctorSockets(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	pilot(t, dir, brokerURL)
	p := newPatient(t, newDifferNode(t, dir, differNode{v: containerd17()}))
	for _, step := range []struct{ name, socket, flag string }{{"key-provider", "keyprovider.sock", "--listen"}, {"differ", "diff.sock", "--diff-listen"}} {
		socket := filepath.Join(dir, step.socket)
		os.Chmod(socket, 0o666)
		p.examine(t).ill(t, step.name, "chmod 0600 "+socket, "every user")
		os.Chmod(socket, 0o660)
		if r := p.examine(t); !strings.Contains(r.text, "its group may use it") {
			t.Errorf("mode 0660:\n%s", r.text)
		} else {
			r.well(t, "broker", "transfer")
		}
		os.Chmod(socket, 0o600)
		p.examine(t, step.flag, "unix://"+p.socket).ill(t, step.name, "ss -lp | grep "+p.socket, "is not pilot's")
		file := write(t, dir+"/file", "")
		p.examine(t, step.flag, "unix://"+file).ill(t, step.name, "mv "+file+" "+file+".away", "is not a socket")
	}
	p.examine(t, "--snapshotter", "nowhere").ill(t, "layer", "journalctl -u containerd.service -u pilot.service -n 30", "snapshotter nowhere")
}

// TestDoctorUsage gives the doctor a configuration that pilot can't have.
func TestDoctorUsage(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	conf := write(t, dir+"/pilot.toml", "broker = 'unix:///b.sock'\nlisten = 'nowhere'\n")
	for want, args := range map[string][]string{
		conf + ":2: listen":        {"--config", conf},
		"broker-cert and":          {"--config", "/dev/null", "--broker-cert", "x"},
		"KEK id":                   {"--config", "/dev/null", "--kek", "a b"},
		"doctor takes no argument": {"--config", "/dev/null", "now"},
	} {
		cmd := command(t, "pilot", append([]string{"node", "doctor"}, args...)...)
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 2 || !strings.Contains(string(out), want) {
			t.Errorf("%v: %v, want %q in\n%s", args, err, want, out)
		}
	}
	out, err := command(t, "pilot", "node", "doctor", "--json", "--config", conf).Output()
	var r report
	if jsonErr := json.Unmarshal(out, &r); err == nil || jsonErr != nil {
		t.Fatal(err, jsonErr)
	}
	r.ill(t, "configuration", "correct "+conf, fmt.Sprintf("%s:2: listen", conf))
	r.skipped(t, "key-provider", "differ", "containerd", "containerd-config", "broker", "layer", "transfer")
}
