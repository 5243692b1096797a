package broker

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
	"github.com/ctrlplane/pilot/internal/tracing/tracetest"
)

// dumpable returns cmd started so that it could dump core.
func dumpable(dir string, cmd *exec.Cmd) *exec.Cmd {
	dump := exec.Command("sh", append([]string{"-c", `ulimit -c unlimited; exec "$0" "$@"`}, cmd.Args...)...)
	dump.Dir, dump.Env = dir, append(os.Environ(), "GOTRACEBACK=crash")
	return dump
}

// privateKey returns the secret part of a private key in PEM.
func privateKey(t testing.TB, file string) []byte {
	t.Helper()
	block, _ := pem.Decode([]byte(harness.Read(t, file)))
	if block == nil {
		t.Fatalf("%s is no PEM", file)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	switch key := key.(type) {
	case *ecdsa.PrivateKey:
		b, err := key.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		return b
	case *rsa.PrivateKey:
		return key.Primes[0].Bytes()
	}
	t.Fatalf("%s: a %T", file, key)
	return nil
}

// TestKeysAreInNoLogFileOrProcess does everything with keys, also what fails, and then looks for the keys
// themselves: in all logs, answers and traces, in the environments and arguments of all processes, in profiles and
// goroutine dumps, and in all files.
func TestKeysAreInNoLogFileOrProcess(t *testing.T) {
	began := time.Now()
	collector := tracetest.Start(t)
	for name, value := range map[string]string{
		"OTEL_EXPORTER_OTLP_ENDPOINT": collector.URL, "OTEL_BSP_SCHEDULE_DELAY": "20", "PILOT_LOG_LEVEL": "debug",
	} {
		t.Setenv(name, value)
	}
	processes := watchProcesses()
	var said bytes.Buffer
	// does runs a command that may fail if it says so.
	does := func(cmd *exec.Cmd, wants ...string) string {
		t.Helper()
		out, err := cmd.CombinedOutput()
		fmt.Fprintf(&said, "%s\n%s\n", cmd.Args, out)
		if (err != nil) != (len(wants) > 0) {
			t.Fatalf("%s: %v\n%s", cmd.Args, err, out)
		}
		text := strings.ReplaceAll(string(out), `\"`, `"`)
		for _, want := range wants {
			if !strings.Contains(text, want) {
				t.Errorf("%s: want %q in\n%s", cmd.Args, want, out)
			}
		}
		return string(out)
	}

	dir := harness.TempDir(t)
	var all secrets
	random := func(name string) []byte {
		b := make([]byte, 32)
		rand.Read(b)
		all.add(name, b)
		return b
	}
	planted := random("planted")

	// A broker with a KEK of known bytes, and its clients.
	etc, store := dir+"/etc", dir+"/store"
	address := loopbacktest.FreeAddress(t)
	_, port, _ := net.SplitHostPort(address)
	does(harness.Command(t, "copilot", "init", "--config-dir", etc, "--dir", store, "--host", "127.0.0.1", "--port", port, "--trust-domain", "example.com"))
	copilot := func(args ...string) *exec.Cmd {
		return harness.Command(t, "copilot", append(append(args[:2:2], "--config", etc+"/copilot.toml"), args[2:]...)...)
	}
	kek := random("KEK")
	does(copilot("keys", "import", "--file", harness.Write(t, dir+"/kek", string(kek)), "team-a"))
	os.Remove(dir + "/kek")
	does(copilot("keys", "create", "team-b"))
	for name, role := range map[string]string{"node": "node", "builder": "ci"} {
		does(harness.Command(t, "copilot", "enroll", "--config-dir", etc, "--out", etc, "--role", role, name))
		all.add(name+"'s private key", privateKey(t, etc+"/"+name+"-key.pem"))
	}
	for _, name := range []string{"server", "admin", "ca"} {
		all.add(name+"'s private key", privateKey(t, etc+"/"+name+"-key.pem"))
	}
	all.add("master key", []byte(harness.Read(t, store+"/master.key")))
	serve := func() *harness.Process {
		p := harness.Start(t, dir, "copilot", dumpable(dir, exec.Command("copilot", "serve", "--config", etc+"/copilot.toml", "--listen", address, "--listen", "unix://"+dir+"/copilot.sock")))
		harness.Await(t, "copilot", harness.Reachable(dir+"/copilot.sock"))
		return p
	}
	broker := serve()
	url := "https://" + address
	tls := func(name string) []string {
		return []string{"--broker-ca", etc + "/ca.pem", "--broker-cert", etc + "/" + name + ".pem", "--broker-key", etc + "/" + name + "-key.pem"}
	}
	provider := func(home, url string, args ...string) (*harness.Process, string) {
		args = append([]string{"serve", "--config", "/dev/null", "--listen", "unix://" + home + "/keyprovider.sock", "--admin-listen", "unix://" + home + "/admin.sock",
			"--diff-listen", "unix://" + home + "/diff.sock", "--containerd", home + "/containerd.sock", "--layer-record", home + "/layers", "--broker-timeout", "5s", "--broker", url}, args...)
		p := harness.Start(t, home, "pilot", dumpable(home, exec.Command("pilot", args...)))
		harness.Await(t, "pilot", harness.Reachable(home+"/diff.sock"))
		return p, harness.Write(t, home+"/ocicrypt.conf", `{"key-providers": {"pilot": {"grpc": "unix://`+home+`/keyprovider.sock"}}}`)
	}

	// Encrypted with the KEK, and by the broker.
	home := dir + "/node"
	nodePilot, conf := provider(home, url, tls("node")...)
	_, builderConf := provider(dir+"/builder", url, append(tls("builder"), "--annotation-format", "copilot")...)
	c := harness.NewCI(t, dir+"/ci", conf)
	debug := func(n *harness.Node, args ...string) *exec.Cmd {
		return n.CtrPilot(append([]string{"--debug"}, args...)...)
	}
	image := func(tag string) string {
		name := c.Registry + "/app:" + tag
		l := harness.NewLayout(t)
		does(debug(c.Node, "images", "import", "--no-unpack", l.Tar(dir+"/image.tar", name+"-plain", l.Image(harness.LayerKinds[1], false, harness.Arch, harness.NewSecret()))))
		does(debug(c.Node, "images", "encrypt", "--recipient", "provider:pilot:team-a", name+"-plain", name))
		does(debug(c.Node, "images", "push", "--plain-http", name))
		return name
	}
	images := []string{image("local")}
	c.Ocicrypt = builderConf
	images = append(images, image("broker"))
	c.Ocicrypt = conf
	layerKeys := func(name string) {
		n := 0
		for _, l := range layersOf(c, name) {
			key := unwrapWith(t, dir+"/copilot.sock", l)
			all.add(fmt.Sprintf("layer key %d of %s", n, name), key)
			n++
		}
		if n == 0 {
			t.Fatalf("%s has no encrypted layers", name)
		}
	}
	for _, name := range images {
		layerKeys(name)
	}
	n := harness.NewDifferNode(t, home, harness.DifferConfig{Containerd: harness.Containerd2()})
	decoder := harness.NewNode(t, dir+"/decoder", harness.Containerd2(), conf, "")
	for _, name := range images {
		does(n.Ctr("--debug", "images", "pull", "--plain-http", name))
		does(n.Ctr("run", "--rm", name, harness.ContainerID()))
		does(n.Ctr("images", "remove", "--sync", name)) // or its layers are not unpacked again
		does(decoder.Crictl("--debug", "pull", name))
		does(decoder.Crictl("rmi", name))
		does(debug(c.Node, "images", "decrypt", name, name+"-decrypted"))
		does(debug(c.Node, "images", "layerinfo", name))
	}
	request := `{"op":"keywrap","keywrapparams":{"ec":{"Parameters":{"pilot":["dGVhbS1h"]}},"optsdata":"` + base64.StdEncoding.EncodeToString(random("what the executable wraps")) + `"}}`
	once := harness.Command(t, "pilot", append([]string{"keyprovider", "--config", "/dev/null", "--broker", url}, tls("node")...)...)
	once.Stdin = strings.NewReader(request)
	does(once)
	does(copilot("keys", "rotate", "team-a"))
	does(debug(c.Node, "images", "rewrap", images[0], images[0]+"-rewrapped"))

	// Failures.
	tampered := c.Tamper(images[0], func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
	does(n.Ctr("--debug", "images", "pull", "--plain-http", tampered), "HMAC does not match")
	does(decoder.Crictl("--debug", "pull", tampered), "HMAC does not match")
	other := dir + "/other"
	harness.Write(t, dir+"/kek", string(random("another KEK of that name")))
	does(harness.Command(t, "copilot", "keys", "import", "--dir", other, "--file", dir+"/kek", "team-a"))
	os.Remove(dir + "/kek")
	harness.Start(t, other, "copilot", dumpable(other, exec.Command("copilot", "serve", "--dir", other, "--listen", "unix://"+other+"/copilot.sock")))
	harness.Await(t, "copilot", harness.Reachable(other+"/copilot.sock"))
	_, otherConf := provider(dir+"/wrong", "unix://"+other+"/copilot.sock")
	c.Ocicrypt = otherConf
	for _, name := range images {
		does(debug(c.Node, "images", "decrypt", name, name+"-again"), "does not unwrap")
	}
	token := "eyJhbGciOiJSUzI1NiJ9." + hex.EncodeToString(random("token"))
	all.add("token as text", []byte(token))
	_, tokenConf := provider(dir+"/token", url, "--broker-ca", etc+"/ca.pem", "--broker-token-file", harness.Write(t, dir+"/secret-token", token))
	c.Ocicrypt = tokenConf
	does(debug(c.Node, "images", "decrypt", images[0], images[0]+"-again"), "KEK \"team-a\"")
	for _, bad := range []string{request[:len(request)-3], strings.Replace(request, "keywrap\"", "keyunwrap\"", 1), strings.Replace(request, `"dGVhbS1h"`, `"bm9ib2R5"`, 1)} {
		wrong := harness.Command(t, "pilot", append([]string{"keyprovider", "--config", "/dev/null", "--broker", url}, tls("node")...)...)
		wrong.Stdin = strings.NewReader(bad)
		does(wrong, "pilot")
	}

	// What root can read.
	for _, socket := range []string{home + "/admin.sock", store + "/admin.sock", other + "/admin.sock"} {
		for _, path := range []string{"/metrics", "/debug/pprof/heap?debug=1", "/debug/pprof/heap", "/debug/pprof/allocs", "/debug/pprof/goroutine?debug=2", "/debug/pprof/goroutine?debug=1", "/debug/pprof/trace?seconds=0.1"} {
			said.WriteString(harness.AdminGet(t, socket, path))
		}
	}
	broker.Stop(t)
	c.Ocicrypt = conf
	does(debug(c.Node, "images", "encrypt", "--recipient", "provider:pilot:team-a", images[0]+"-plain", images[0]+"-again"), "copilot at "+url)
	broker = serve()

	// They crash, where core dumps are allowed. The key is in memory then.
	for name, p := range map[string]*harness.Process{"pilot": nodePilot, "copilot": broker} {
		if err := p.Cmd.Process.Signal(syscall.SIGQUIT); err != nil {
			t.Fatal(err)
		}
		<-p.Done
		if log := harness.Read(t, p.Log); !strings.Contains(log, "goroutine ") {
			t.Errorf("%s: SIGQUIT made no dump of its goroutines", name)
		}
		if p.Cmd.ProcessState.Sys().(syscall.WaitStatus).CoreDump() {
			t.Errorf("%s dumped core", name)
		}
	}
	if cores, _ := filepath.Glob(dir + "/*/core*"); len(cores) > 0 {
		t.Errorf("there are core dumps: %s", cores)
	}
	// A program that does not prevent it does dump core here.
	crash := exec.Command("sh", "-c", "ulimit -c unlimited; kill -ABRT $$")
	crash.Dir = dir
	crash.Run()
	t.Logf("another program dumps core: %v", crash.ProcessState.Sys().(syscall.WaitStatus).CoreDump())

	// The search is tried on what is planted.
	harness.Write(t, dir+"/deep/down/planted", "x"+base64.StdEncoding.EncodeToString(planted))
	leaky := exec.Command("sleep", "1000")
	leaky.Env = append(os.Environ(), "KEY="+hex.EncodeToString(planted))
	argument := exec.Command("sh", "-c", "sleep 1000; :", hex.EncodeToString(planted))
	for _, cmd := range []*exec.Cmd{leaky, argument} {
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer cmd.Wait()
		defer cmd.Process.Kill()
	}

	plantedAt := map[string]bool{}
	report := func(where string, found []string, allowed func(string) bool) {
		t.Helper()
		for _, f := range found {
			switch {
			case strings.HasPrefix(f, "planted"):
				plantedAt[filepath.Base(where)] = true
			case allowed == nil || !allowed(f):
				t.Errorf("%s: %s", where, f)
			}
		}
	}
	for text, where := range processes.stop() {
		report(where, all.in([]byte(text)), nil)
	}
	report("what commands and profiles said", all.in(said.Bytes()), nil)
	spans, err := json.Marshal(collector.Spans(t, 10))
	if err != nil {
		t.Fatal(err)
	}
	report("traces", all.in(spans), nil)
	files := all.below(t, dir)
	// And what was made elsewhere meanwhile.
	entries, err := os.ReadDir(os.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err == nil && info.Mode().IsRegular() && info.ModTime().After(began) && info.Size() < 64<<20 {
			b, err := os.ReadFile(filepath.Join(os.TempDir(), e.Name()))
			if errors.Is(err, fs.ErrNotExist) {
				continue // somebody else's
			}
			if err != nil {
				t.Error(err)
			}
			if found := all.in(b); len(found) > 0 {
				files[filepath.Join(os.TempDir(), e.Name())] = found
			}
		}
	}
	for file, found := range files {
		report(file, found, func(f string) bool {
			name := filepath.Base(file)
			return strings.HasSuffix(name, "-key.pem") && strings.HasPrefix(f, strings.TrimSuffix(name, "-key.pem")+"'s private key") && filepath.Dir(file) == etc ||
				name == "master.key" && strings.HasPrefix(f, "master key") || name == "secret-token" && strings.HasPrefix(f, "token")
		})
	}
	for _, where := range []string{"planted", "environ", "cmdline"} {
		if !plantedAt[where] {
			t.Errorf("the planted secret was not found in %s", where)
		}
	}
	for _, legitimate := range []string{etc + "/server-key.pem", store + "/master.key", dir + "/secret-token"} {
		if files[legitimate] == nil {
			t.Errorf("%s was not searched", legitimate)
		}
	}
}

// layersOf returns the annotations of the layers of an image in the registry.
func layersOf(c *harness.CI, name string) (all []map[string]string) {
	c.T.Helper()
	repository, tag, _ := strings.Cut(strings.TrimPrefix(name, c.Registry+"/"), ":")
	link := harness.Read(c.T, filepath.Join(c.Storage, "docker/registry/v2/repositories", repository, "_manifests/tags", tag, "current/link"))
	var m struct {
		Layers []struct{ Annotations map[string]string }
	}
	if err := json.Unmarshal([]byte(harness.Read(c.T, c.Blob(link))), &m); err != nil {
		c.T.Fatal(err)
	}
	for _, l := range m.Layers {
		all = append(all, l.Annotations)
	}
	return all
}

// unwrapWith returns the layer key that a layer's annotation wraps, with a broker.
func unwrapWith(t testing.TB, socket string, annotations map[string]string) []byte {
	t.Helper()
	b, err := base64.StdEncoding.DecodeString(annotations["org.opencontainers.image.enc.keys.provider.pilot"])
	if err != nil {
		t.Fatal(err)
	}
	var a struct {
		Method     string `json:"method"`
		KEKID      string `json:"kekId"`
		KEKVersion int    `json:"kekVersion"`
		IV         []byte `json:"iv,omitempty"`
		WrappedKey []byte `json:"wrappedKey"`
	}
	if err := json.Unmarshal(b, &a); err != nil {
		t.Fatalf("%s: %v", b, err)
	}
	in, err := json.Marshal(harness.Object{"version": a.KEKVersion, "method": a.Method, "iv": a.IV, "wrappedKey": a.WrappedKey})
	if err != nil {
		t.Fatal(err)
	}
	status, out := harness.RequestOverSocket(t, socket, "POST", "/api/v2/keks/"+a.KEKID+"/unwrap", string(in))
	var answer struct{ Plaintext []byte }
	var key struct{ SymKey []byte }
	if err := json.Unmarshal([]byte(out), &answer); err != nil || status != http.StatusOK {
		t.Fatalf("%d %s: %v", status, out, err)
	}
	if err := json.Unmarshal(answer.Plaintext, &key); err != nil || len(key.SymKey) != 32 {
		t.Fatalf("a layer key of %d bytes: %v", len(key.SymKey), err)
	}
	return key.SymKey
}
