//go:build engines

package engines

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// tool returns a program of scripts/install-tools.sh.
func tool(t testing.TB, name string) string {
	t.Helper()
	path := filepath.Join(harness.Tools, "bin", name)
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%s is missing: install it with \"scripts/install-tools.sh %s engines\"", path, harness.Tools)
	}
	return path
}

// crio is a CRI-O with its own directories.
type crio struct {
	*harness.Node
	broker string // of the pilot in the same directory
}

// newCRIO starts a pilot, and a CRI-O 1.34 with it as the key provider. CRI-O's
// decryption_keys_path is dir/keys, which does not exist.
func newCRIO(t testing.TB, dir, broker, pause string) *crio {
	t.Helper()
	_, ociConf := harness.StartPilot(t, dir, broker)
	n := &crio{&harness.Node{T: t, Dir: dir, Socket: filepath.Join(dir, "crio.sock"), Ocicrypt: ociConf}, broker}
	conf := strings.ReplaceAll(`[crio]
root = "DIR/root"
runroot = "DIR/run"
storage_driver = "vfs"
log_dir = "DIR/log"
version_file = "DIR/version"
version_file_persist = ""
clean_shutdown_file = ""
[crio.api]
listen = "DIR/crio.sock"
stream_port = "0"
[crio.runtime]
cgroup_manager = "cgroupfs"
conmon_cgroup = "pod"
namespaces_dir = "DIR/namespaces"
container_exits_dir = "DIR/exits"
container_attach_socket_dir = "DIR/attach"
hooks_dir = ["DIR/hooks"]
disable_hostport_mapping = true
irqbalance_config_restore_file = "disable"
decryption_keys_path = "DIR/keys"
pinns_path = "PINNS"
default_runtime = "runc"
[crio.runtime.runtimes.runc]
runtime_path = "RUNC"
runtime_root = "DIR/runc"
monitor_path = "CONMON"
monitor_cgroup = "pod"
[crio.image]
pause_image = "PAUSE"
signature_policy = "DIR/policy.json"
signature_policy_dir = "DIR/policies"
[crio.network]
network_dir = "DIR/cni"
plugin_dirs = ["DIR/cni"]
[crio.nri]
enable_nri = false
`, "DIR", dir)
	for name, program := range map[string]string{"RUNC": "runc", "CONMON": "conmon"} {
		path, err := exec.LookPath(program)
		if err != nil {
			t.Fatalf("%s is missing: install it with \"scripts/install-tools.sh %s\"", program, harness.Tools)
		}
		conf = strings.Replace(conf, name, path, 1)
	}
	conf = strings.NewReplacer("PINNS", tool(t, "pinns"), "PAUSE", pause).Replace(conf)
	harness.Write(t, filepath.Join(dir, "policy.json"), `{"default": [{"type": "insecureAcceptAnything"}]}`)
	harness.Write(t, filepath.Join(dir, "crio.conf"), conf)
	n.start(t)
	return n
}

func (n *crio) start(t testing.TB) {
	t.Helper()
	cmd := exec.Command(tool(t, "crio"), "--config", filepath.Join(n.Dir, "crio.conf"), "--config-dir", filepath.Join(n.Dir, "crio.conf.d"))
	cmd.Env = append(os.Environ(), "OCICRYPT_KEYPROVIDER_CONFIG="+n.Ocicrypt)
	n.Process = harness.Start(t, n.Dir, "crio", cmd)
	harness.Await(t, "CRI-O", func() error { return n.Crictl("info").Run() })
}

// examine runs "pilot node doctor" on the machine.
func (n *crio) examine(t testing.TB) harness.DoctorReport {
	t.Helper()
	out, err := harness.Command(t, "pilot", "node", "doctor", "--json", "--config", "/dev/null", "--listen", "unix://"+n.Dir+"/keyprovider.sock", "--diff-listen", "off",
		"--broker", n.broker, "--crio", n.Socket, "--kek", "team-a").Output()
	r := harness.DoctorReport{Output: string(out)}
	if json.Unmarshal(out, &r) != nil || r.OK != (err == nil) {
		t.Fatalf("doctor: %v\n%s", err, out)
	}
	return r
}

// expectStep checks the result of a step, and that its detail contains each of said.
func expectStep(t testing.TB, r harness.DoctorReport, step, result string, said ...string) {
	t.Helper()
	for _, s := range r.Steps {
		if s.Name != step {
			continue
		}
		if s.Result != result || (result == "failed") != (len(s.Fix) > 0) {
			t.Errorf("%s is %s, not %s: %s (%q) in\n%s", step, s.Result, result, s.Detail, s.Fix, r.Output)
		}
		for _, w := range said {
			if !strings.Contains(s.Detail, w) {
				t.Errorf("%s: want %q in %q", step, w, s.Detail)
			}
		}
		return
	}
	t.Errorf("no step %s in\n%s", step, r.Output)
}

// TestCRIO pulls encrypted images with CRI-O, and checks that the doctor predicts failures.
func TestCRIO(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a", "team-b")
	_, strangerURL := harness.StartBroker(t, dir+"/other", "team-b")
	pause := c.Pause()
	n := newCRIO(t, dir+"/node", c.BrokerURL, pause)

	for _, k := range harness.LayerKinds {
		t.Run("run "+k.Name, func(t *testing.T) {
			image := c.Image(k, "provider:pilot:team-a")
			harness.Output(t, n.Crictl("pull", image))
			if out := n.RunPod(t, image); !strings.Contains(out, c.Secrets[image]) {
				t.Errorf("the container said: %s", out)
			}
		})
	}
	t.Run("index", func(t *testing.T) {
		secret := harness.NewSecret()
		l := harness.NewLayout(t)
		image := c.Registry + "/index:1"
		harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", "--all-platforms", l.Tar(c.Dir+"/image.tar", image+"-plain", l.Index(harness.LayerKinds[1], secret))))
		harness.Output(t, c.CtrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", image+"-plain", image))
		harness.Output(t, c.CtrPilot("images", "push", "--plain-http", image))
		harness.Output(t, n.Crictl("pull", image))
		if out := n.RunPod(t, image); !strings.Contains(out, secret) {
			t.Errorf("the container said: %s", out)
		}
	})

	image := c.Image(harness.LayerKinds[0], "provider:pilot:team-a")
	repository, _, _ := strings.Cut(image, ":"+harness.LayerKinds[0].Name)
	t.Run("digest", func(t *testing.T) {
		// Known: CRI-O can't decrypt images that are named by a digest.
		harness.ExpectFailure(t, n.Crictl("pull", repository+"@"+c.Target(image)), "should be decrypted, but we can’t modify the manifest: Destination specifies a digest")
		if harness.ContainsText(t, n.Dir+"/root", c.Secrets[image]) {
			t.Error("the secret is in CRI-O's storage")
		}
	})

	t.Run("stranger", func(t *testing.T) {
		s := newCRIO(t, dir+"/stranger", strangerURL, pause)
		harness.ExpectFailure(t, s.Crictl("pull", image), `KEK "team-a"`, "no such KEK")
		if harness.ContainsText(t, s.Dir+"/root", c.Secrets[image]) {
			t.Error("the secret is in CRI-O's storage")
		}
		r := s.examine(t)
		expectStep(t, r, "broker", "failed", `KEK "team-a"`, "no such KEK")
		expectStep(t, r, "unwrap", "skipped", "broker")
	})

	// Files in CRI-O's decryption_keys_path.
	key := filepath.Join(dir, "key.pem")
	harness.Output(t, harness.Command(t, "openssl", "genrsa", "-out", key, "2048"))
	pem := harness.Read(t, key)
	harness.Output(t, harness.Command(t, "openssl", "rsa", "-in", key, "-pubout", "-out", key+".pub"))
	harness.Output(t, harness.Command(t, "openssl", "rsa", "-in", key, "-aes128", "-passout", "pass:x", "-out", key+".locked"))
	keys := filepath.Join(n.Dir, "keys")
	for name, test := range map[string]struct {
		files map[string]string
		link  string
		wrong string // what both say
	}{
		"missing":        {},
		"empty":          {files: map[string]string{}},
		"a key":          {files: map[string]string{"a.pem": pem}},
		"a README":       {files: map[string]string{"a.pem": pem, "README": "Put keys here.\n"}, wrong: "Unknown decryption key type"},
		"a public key":   {files: map[string]string{"a.pub": harness.Read(t, key+".pub")}, wrong: "Unknown decryption key type"},
		"a locked key":   {files: map[string]string{"a.pem": harness.Read(t, key+".locked")}, wrong: "Unknown decryption key type"},
		"a link":         {files: map[string]string{"a.pem": pem}, link: keys + "/b.pem", wrong: "symbolic link"},
		"below a folder": {files: map[string]string{"more/README": "Put keys here.\n"}, wrong: "Unknown decryption key type"},
	} {
		t.Run("keys/"+name, func(t *testing.T) {
			defer os.RemoveAll(keys)
			if test.files != nil {
				if err := os.Mkdir(keys, 0o700); err != nil {
					t.Fatal(err)
				}
			}
			for file, text := range test.files {
				harness.Write(t, filepath.Join(keys, file), text)
			}
			if test.link != "" {
				if err := os.Symlink(key, test.link); err != nil {
					t.Fatal(err)
				}
			}
			r := n.examine(t)
			harness.Output(t, n.Crictl("rmi", "-a"))
			if test.wrong == "" {
				expectStep(t, r, "crio-keys", "ok", "decryption_keys_path")
				harness.Output(t, n.Crictl("pull", image))
				harness.Output(t, n.Crictl("pull", pause))
				return
			}
			expectStep(t, r, "crio-keys", "failed", test.wrong, keys)
			harness.ExpectFailure(t, n.Crictl("pull", image), test.wrong)
			harness.ExpectFailure(t, n.Crictl("pull", pause), test.wrong) // which is plain
		})
	}

	t.Run("doctor", func(t *testing.T) {
		r := n.examine(t)
		if !r.OK {
			t.Errorf("%s", r.Output)
		}
		for name, detail := range map[string]string{"configuration": "", "key-provider": "keyprovider.sock", "crio": n.Socket, "crio-key-provider": n.Ocicrypt, "crio-keys": "does not exist", "broker": "team-a", "unwrap": "was decrypted"} {
			expectStep(t, r, name, "ok", detail)
		}
		if len(r.Steps) != 7 {
			t.Errorf("%d steps:\n%s", len(r.Steps), r.Output)
		}

		// Changes that CRI-O has not read, or that name another key provider.
		right := harness.Read(t, n.Ocicrypt)
		for name, test := range map[string]struct{ conf, want string }{
			"another provider": {`{"key-providers": {"other": {"grpc": "unix:///x.sock"}}}`, `no key provider "pilot"`},
			"another socket":   {`{"key-providers": {"pilot": {"grpc": "unix:///x.sock"}}}`, "ask unix:///x.sock"},
			"neither":          {`{"key-providers": {"pilot": {}}}`, "neither grpc nor cmd"},
			"not JSON":         {`key-providers: pilot`, "invalid character"},
			"not read yet":     {right + "\n", "after CRI-O had read it"},
		} {
			harness.Write(t, n.Ocicrypt, test.conf)
			r := n.examine(t)
			expectStep(t, r, "crio-key-provider", "failed", test.want, n.Ocicrypt)
			expectStep(t, r, "unwrap", "skipped", "crio-key-provider")
			if r.OK {
				t.Errorf("%s: all is well:\n%s", name, r.Output)
			}
		}
		n.Stop(t)
		expectStep(t, n.examine(t), "crio", "failed", "CRI-O does not answer")

		// An executable, and an unset variable.
		harness.Write(t, n.Ocicrypt, fmt.Sprintf(`{"key-providers": {"pilot": {"cmd": {"path": "%s/pilot", "args": ["keyprovider", "--broker", "%s"]}}}}`, harness.Bin, c.BrokerURL))
		n.start(t)
		harness.Output(t, n.Crictl("rmi", "-a"))
		harness.Output(t, n.Crictl("pull", image))
		expectStep(t, n.examine(t), "unwrap", "ok", "was decrypted")
		n.Stop(t)
		n.Ocicrypt = ""
		n.start(t)
		expectStep(t, n.examine(t), "crio-key-provider", "failed", "OCICRYPT_KEYPROVIDER_CONFIG is not in CRI-O's environment")
		harness.Output(t, n.Crictl("rmi", "-a"))
		harness.ExpectFailure(t, n.Crictl("pull", image), "missing private key needed for decryption")
	})
}

// TestCRIOLibrary pulls with the library of CRI-O's main branch.
func TestCRIOLibrary(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	pull := func(t *testing.T, keys, image string) *exec.Cmd {
		cmd := harness.Command(t, tool(t, "criopull"), "-root", filepath.Join(dir, strings.ReplaceAll(t.Name(), "/", "-")), "-keys", keys, image)
		cmd.Env = append(os.Environ(), "OCICRYPT_KEYPROVIDER_CONFIG="+c.Ocicrypt, "HOME="+dir)
		return cmd
	}
	for _, k := range harness.LayerKinds {
		t.Run(k.Name, func(t *testing.T) {
			image := c.Image(k, "provider:pilot:team-a")
			lines := strings.Fields(harness.Output(t, pull(t, dir+"/none", image)))
			if len(lines) != 2 || lines[0] == c.Target(image) || !harness.ContainsText(t, lines[1], c.Secrets[image]) {
				t.Errorf("pulled: %q", lines)
			}
		})
	}
	image := c.Image(harness.LayerKinds[0], "provider:pilot:team-a")
	t.Run("digest", func(t *testing.T) {
		// Known: it can't decrypt images that are named by a digest.
		repository := strings.TrimSuffix(image, ":"+harness.LayerKinds[0].Name)
		harness.ExpectFailure(t, pull(t, dir+"/none", repository+"@"+c.Target(image)), "should be decrypted, but we can’t modify the manifest: Destination specifies a digest")
	})
	keys := filepath.Join(dir, "keys")
	if err := os.Mkdir(keys, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Run("no keys", func(t *testing.T) { harness.Output(t, pull(t, keys, image)) })
	t.Run("no key", func(t *testing.T) {
		harness.Write(t, keys+"/README", "Put keys here.\n")
		harness.ExpectFailure(t, pull(t, keys, image), "Unknown decryption key type")
	})
}
