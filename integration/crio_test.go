//go:build engines

package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// tool returns a program of scripts/install-tools.sh.
func tool(t testing.TB, name string) string {
	t.Helper()
	path := filepath.Join(tools, "bin", name)
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%s is missing: install it with \"scripts/install-tools.sh %s engines\"", path, tools)
	}
	return path
}

// crio is a CRI-O of its own.
type crio struct {
	*node
	broker string // of the pilot in the same directory
}

// newCRIO starts a pilot, and a CRI-O 1.34 whose key provider it is. CRI-O's decryption_keys_path is keys in dir, which does not exist.
func newCRIO(t testing.TB, dir, broker, pause string) *crio {
	t.Helper()
	_, ociConf := pilot(t, dir, broker)
	n := &crio{&node{t: t, dir: dir, socket: filepath.Join(dir, "crio.sock"), ocicrypt: ociConf}, broker}
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
			t.Fatalf("%s is missing: install it with \"scripts/install-tools.sh %s\"", program, tools)
		}
		conf = strings.Replace(conf, name, path, 1)
	}
	conf = strings.NewReplacer("PINNS", tool(t, "pinns"), "PAUSE", pause).Replace(conf)
	write(t, filepath.Join(dir, "policy.json"), `{"default": [{"type": "insecureAcceptAnything"}]}`)
	write(t, filepath.Join(dir, "crio.conf"), conf)
	n.start(t)
	return n
}

func (n *crio) start(t testing.TB) {
	t.Helper()
	cmd := exec.Command(tool(t, "crio"), "--config", filepath.Join(n.dir, "crio.conf"), "--config-dir", filepath.Join(n.dir, "crio.conf.d"))
	cmd.Env = append(os.Environ(), "OCICRYPT_KEYPROVIDER_CONFIG="+n.ocicrypt)
	n.process = start(t, n.dir, "crio", cmd)
	await(t, "CRI-O", func() error { return n.crictl("info").Run() })
}

// examine has pilot node doctor examine the machine.
func (n *crio) examine(t testing.TB) report {
	t.Helper()
	out, err := command(t, "pilot", "node", "doctor", "--json", "--config", "/dev/null", "--listen", "unix://"+n.dir+"/keyprovider.sock", "--diff-listen", "off",
		"--broker", n.broker, "--crio", n.socket, "--kek", "team-a").Output()
	r := report{text: string(out)}
	if json.Unmarshal(out, &r) != nil || r.OK != (err == nil) {
		t.Fatalf("doctor: %v\n%s", err, out)
	}
	return r
}

// has checks the result of a step and that its detail says each of said.
func (r report) has(t testing.TB, step, result string, said ...string) {
	t.Helper()
	for _, s := range r.Steps {
		if s.Name != step {
			continue
		}
		if s.Result != result || (result == "failed") != (len(s.Mend) > 0) {
			t.Errorf("%s is %s, not %s: %s (%q) in\n%s", step, s.Result, result, s.Detail, s.Mend, r.text)
		}
		for _, w := range said {
			if !strings.Contains(s.Detail, w) {
				t.Errorf("%s: want %q in %q", step, w, s.Detail)
			}
		}
		return
	}
	t.Errorf("no step %s in\n%s", step, r.text)
}

// TestCRIO pulls encrypted images with CRI-O, and has the doctor foresee what
// fails.
func TestCRIO(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a", "team-b")
	_, strangerURL := broker(t, dir+"/other", "team-b")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	c := newCI(t, dir+"/ci", ociConf)
	pause := c.pause()
	n := newCRIO(t, dir+"/node", brokerURL, pause)

	for _, k := range kinds {
		t.Run("run "+k.name, func(t *testing.T) {
			image := c.image(k, "provider:pilot:team-a")
			output(t, n.crictl("pull", image))
			if out := n.pod(t, image); !strings.Contains(out, c.secrets[image]) {
				t.Errorf("the container said: %s", out)
			}
		})
	}
	t.Run("index", func(t *testing.T) {
		secret := newSecret()
		l := newLayout(t)
		image := c.registry + "/index:1"
		output(t, c.ctrPilot("images", "import", "--no-unpack", "--all-platforms", l.tar(c.dir+"/image.tar", image+"-plain", l.index(kinds[1], secret))))
		output(t, c.ctrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", image+"-plain", image))
		output(t, c.ctrPilot("images", "push", "--plain-http", image))
		output(t, n.crictl("pull", image))
		if out := n.pod(t, image); !strings.Contains(out, secret) {
			t.Errorf("the container said: %s", out)
		}
	})

	image := c.image(kinds[0], "provider:pilot:team-a")
	repository, _, _ := strings.Cut(image, ":"+kinds[0].name)
	t.Run("digest", func(t *testing.T) {
		// Known: CRI-O can't decrypt what is named by a digest.
		fails(t, n.crictl("pull", repository+"@"+c.target(image)), "should be decrypted, but we can’t modify the manifest: Destination specifies a digest")
		if contains(t, n.dir+"/root", c.secrets[image]) {
			t.Error("the secret is in CRI-O's storage")
		}
	})

	t.Run("stranger", func(t *testing.T) {
		s := newCRIO(t, dir+"/stranger", strangerURL, pause)
		fails(t, s.crictl("pull", image), `KEK "team-a"`, "no such KEK")
		if contains(t, s.dir+"/root", c.secrets[image]) {
			t.Error("the secret is in CRI-O's storage")
		}
		r := s.examine(t)
		r.has(t, "broker", "failed", `KEK "team-a"`, "no such KEK")
		r.has(t, "unwrap", "skipped", "broker")
	})

	// What CRI-O finds in decryption_keys_path.
	key := filepath.Join(dir, "key.pem")
	output(t, command(t, "openssl", "genrsa", "-out", key, "2048"))
	pem := read(t, key)
	output(t, command(t, "openssl", "rsa", "-in", key, "-pubout", "-out", key+".pub"))
	output(t, command(t, "openssl", "rsa", "-in", key, "-aes128", "-passout", "pass:x", "-out", key+".locked"))
	keys := filepath.Join(n.dir, "keys")
	for name, test := range map[string]struct {
		files map[string]string
		link  string
		wrong string // what both say
	}{
		"missing":        {},
		"empty":          {files: map[string]string{}},
		"a key":          {files: map[string]string{"a.pem": pem}},
		"a README":       {files: map[string]string{"a.pem": pem, "README": "Put keys here.\n"}, wrong: "Unknown decryption key type"},
		"a public key":   {files: map[string]string{"a.pub": read(t, key+".pub")}, wrong: "Unknown decryption key type"},
		"a locked key":   {files: map[string]string{"a.pem": read(t, key+".locked")}, wrong: "Unknown decryption key type"},
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
				write(t, filepath.Join(keys, file), text)
			}
			if test.link != "" {
				if err := os.Symlink(key, test.link); err != nil {
					t.Fatal(err)
				}
			}
			r := n.examine(t)
			output(t, n.crictl("rmi", "-a"))
			if test.wrong == "" {
				r.has(t, "crio-keys", "ok", "decryption_keys_path")
				output(t, n.crictl("pull", image))
				output(t, n.crictl("pull", pause))
				return
			}
			r.has(t, "crio-keys", "failed", test.wrong, keys)
			fails(t, n.crictl("pull", image), test.wrong)
			fails(t, n.crictl("pull", pause), test.wrong) // which is plain
		})
	}

	t.Run("doctor", func(t *testing.T) {
		r := n.examine(t)
		if !r.OK {
			t.Errorf("%s", r.text)
		}
		for name, detail := range map[string]string{"configuration": "", "key-provider": "keyprovider.sock", "crio": n.socket, "crio-key-provider": n.ocicrypt, "crio-keys": "does not exist", "broker": "team-a", "unwrap": "was decrypted"} {
			r.has(t, name, "ok", detail)
		}
		if len(r.Steps) != 7 {
			t.Errorf("%d steps:\n%s", len(r.Steps), r.text)
		}

		// Changes that CRI-O has not read, or that lead it elsewhere.
		right := read(t, n.ocicrypt)
		for name, test := range map[string]struct{ conf, want string }{
			"another provider": {`{"key-providers": {"other": {"grpc": "unix:///x.sock"}}}`, `no key provider "pilot"`},
			"another socket":   {`{"key-providers": {"pilot": {"grpc": "unix:///x.sock"}}}`, "ask unix:///x.sock"},
			"neither":          {`{"key-providers": {"pilot": {}}}`, "neither grpc nor cmd"},
			"not JSON":         {`key-providers: pilot`, "invalid character"},
			"not read yet":     {right + "\n", "after CRI-O had read it"},
		} {
			write(t, n.ocicrypt, test.conf)
			r := n.examine(t)
			r.has(t, "crio-key-provider", "failed", test.want, n.ocicrypt)
			r.has(t, "unwrap", "skipped", "crio-key-provider")
			if r.OK {
				t.Errorf("%s: all is well:\n%s", name, r.text)
			}
		}
		n.stop(t)
		n.examine(t).has(t, "crio", "failed", "CRI-O does not answer")

		// An executable, and a variable that is not set.
		write(t, n.ocicrypt, fmt.Sprintf(`{"key-providers": {"pilot": {"cmd": {"path": "%s/pilot", "args": ["keyprovider", "--broker", "%s"]}}}}`, bin, brokerURL))
		n.start(t)
		output(t, n.crictl("rmi", "-a"))
		output(t, n.crictl("pull", image))
		n.examine(t).has(t, "unwrap", "ok", "was decrypted")
		n.stop(t)
		n.ocicrypt = ""
		n.start(t)
		n.examine(t).has(t, "crio-key-provider", "failed", "OCICRYPT_KEYPROVIDER_CONFIG is not in CRI-O's environment")
		output(t, n.crictl("rmi", "-a"))
		fails(t, n.crictl("pull", image), "missing private key needed for decryption")
	})
}

// TestCRIOLibrary pulls with the library of CRI-O's main branch.
func TestCRIOLibrary(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	c := newCI(t, dir+"/ci", ociConf)
	pull := func(t *testing.T, keys, image string) *exec.Cmd {
		cmd := command(t, tool(t, "criopull"), "-root", filepath.Join(dir, strings.ReplaceAll(t.Name(), "/", "-")), "-keys", keys, image)
		cmd.Env = append(os.Environ(), "OCICRYPT_KEYPROVIDER_CONFIG="+ociConf, "HOME="+dir)
		return cmd
	}
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			image := c.image(k, "provider:pilot:team-a")
			lines := strings.Fields(output(t, pull(t, dir+"/none", image)))
			if len(lines) != 2 || lines[0] == c.target(image) || !contains(t, lines[1], c.secrets[image]) {
				t.Errorf("pulled: %q", lines)
			}
		})
	}
	image := c.image(kinds[0], "provider:pilot:team-a")
	t.Run("digest", func(t *testing.T) {
		// Known: it can't decrypt what is named by a digest.
		repository := strings.TrimSuffix(image, ":"+kinds[0].name)
		fails(t, pull(t, dir+"/none", repository+"@"+c.target(image)), "should be decrypted, but we can’t modify the manifest: Destination specifies a digest")
	})
	keys := filepath.Join(dir, "keys")
	if err := os.Mkdir(keys, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Run("no keys", func(t *testing.T) { output(t, pull(t, keys, image)) })
	t.Run("no key", func(t *testing.T) {
		write(t, keys+"/README", "Put keys here.\n")
		fails(t, pull(t, keys, image), "Unknown decryption key type")
	})
}
