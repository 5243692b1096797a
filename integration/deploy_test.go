package integration

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// booted is a machine that systemd runs, in namespaces of its own but for the
// network's.
type booted struct {
	*machine
	init int // process of its init
}

// boot boots a machine that sees podFiles as /pod.
func boot(t testing.TB, podFiles string, prepare func(root string)) *booted {
	t.Helper()
	dir := tempDir(t)
	m := &machine{t, filepath.Join(dir, "root"), filepath.Join(dir, "lib")}
	for _, name := range []string{"upper", "work", "lib"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m.mount("overlay", "", "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", filepath.Join(tools, "trixie"), dir, dir))
	prepare(m.root)
	cmd := exec.Command("systemd-nspawn", "--boot", "--register=no", "--keep-unit", "--console=pipe", "--system-call-filter=@keyring bpf", "--machine="+filepath.Base(dir), "--directory="+m.root, "--bind="+m.lib+":/var/lib/containerd", "--bind="+podFiles+":/pod")
	cmd.Env = append(os.Environ(), "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1")
	p := start(t, dir, "systemd-nspawn", cmd)
	b := &booted{machine: m}
	await(t, "the machine's init", func() error {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", p.cmd.Process.Pid))
		if err != nil {
			return err
		}
		b.init, err = strconv.Atoi(strings.TrimSpace(string(children)))
		return err
	})
	await(t, "the machine's containerd", func() error { return b.run("ctr", "version").Run() })
	return b
}

// run returns a command on the machine.
func (b *booted) run(name string, args ...string) *exec.Cmd {
	b.t.Helper()
	cmd := command(b.t, "nsenter", append([]string{"--target", strconv.Itoa(b.init), "--mount", "--pid", "--uts", "--ipc", "--cgroup", "--root", "--wd", name}, args...)...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}
	return cmd
}

// service returns the main process of a service, which is 0 if it does not
// run.
func (b *booted) service(name string) string {
	b.t.Helper()
	return strings.TrimSpace(output(b.t, b.run("systemctl", "show", "--property=MainPID", "--value", name)))
}

// cluster stands in for a cluster's API server: it has a DaemonSet, and issues
// tokens to its pods.
type cluster struct {
	*httptest.Server
	key *ecdsa.PrivateKey
	dir string // of the files that a pod gets

	mu                   sync.Mutex
	daemonSet, namespace object // their metadata
}

func newCluster(t testing.TB) *cluster {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{key: key, dir: tempDir(t), daemonSet: object{"uid": "1"}, namespace: object{"uid": "2"}}
	c.Server = httptest.NewTLSServer(c)
	t.Cleanup(c.Close)
	write(t, c.dir+"/account/ca.crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate().Raw})))
	write(t, c.dir+"/account/token", "api-token")
	write(t, c.dir+"/broker/token", c.token(t))
	return c
}

func (c *cluster) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var answer any
	object := func(metadata object) {
		switch {
		case r.Header.Get("Authorization") != "Bearer api-token":
			w.WriteHeader(http.StatusUnauthorized)
			answer = map[string]any{"kind": "Status", "reason": "Unauthorized"}
		case metadata == nil:
			w.WriteHeader(http.StatusNotFound)
			answer = map[string]any{"kind": "Status", "reason": "NotFound"}
		default:
			answer = map[string]any{"metadata": metadata}
		}
	}
	switch r.URL.Path {
	case "/.well-known/openid-configuration":
		answer = map[string]any{"issuer": c.URL, "jwks_uri": c.URL + "/openid/v1/jwks", "id_token_signing_alg_values_supported": []string{"ES256"}}
	case "/openid/v1/jwks":
		answer = jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: c.key.Public(), KeyID: "1", Algorithm: "ES256", Use: "sig"}}}
	case "/apis/apps/v1/namespaces/pilot-system/daemonsets/pilot":
		object(c.daemonSet)
	case "/api/v1/namespaces/pilot-system":
		object(c.namespace)
	default:
		http.NotFound(w, r)
		return
	}
	json.NewEncoder(w).Encode(answer)
}

// token returns a new token of pilot's service account.
func (c *cluster) token(t testing.TB) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: c.key, KeyID: "1"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	token, err := jwt.Signed(signer).Claims(jwt.Claims{
		Issuer: c.URL, Subject: "system:serviceaccount:pilot-system:pilot", Audience: jwt.Audience{"copilot"},
		Expiry: jwt.NewNumericDate(time.Now().Add(time.Hour)), ID: strconv.FormatInt(time.Now().UnixNano(), 10),
	}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// pod is a pod of the DaemonSet's, without a kubelet.
type pod struct {
	*booted
	name string
}

// daemonSetManifest is the DaemonSet's, and what the test's pods have of it.
const daemonSetManifest = "packaging/kubernetes/pilot/daemonset.yaml"

// pod starts a pod of an image with what the DaemonSet's have: its arguments,
// the node's processes, all rights, a file system that can't be written.
func (b *booted) pod(c *cluster, name, image, broker string) *pod {
	b.t.Helper()
	url := strings.TrimPrefix(c.URL, "https://")
	host, port, err := net.SplitHostPort(url)
	if err != nil {
		b.t.Fatal(err)
	}
	args := []string{"--namespace", "k8s.io", "run", "--detach", "--log-uri", "file:///var/log/" + name, "--privileged", "--net-host", "--with-ns", "pid:/proc/1/ns/pid", "--read-only",
		"--env", "KUBERNETES_SERVICE_HOST=" + host, "--env", "KUBERNETES_SERVICE_PORT=" + port, "--env", "POD_NAMESPACE=pilot-system",
		"--mount", "type=bind,src=/pod/account,dst=/var/run/secrets/kubernetes.io/serviceaccount,options=rbind:ro",
		"--mount", "type=bind,src=/pod/broker,dst=/run/broker,options=rbind:ro",
		image, name, "/usr/bin/pilot", "node", "deploy", "--broker=" + broker}
	for _, arg := range []string{"--broker-ca-from=/run/broker/ca.pem", "--broker-token-from=/run/broker/token"} {
		if !strings.Contains(read(b.t, filepath.Join(repo, daemonSetManifest)), "- "+arg+"\n") {
			b.t.Errorf("%s has no argument %s", daemonSetManifest, arg)
		}
		args = append(args, arg)
	}
	output(b.t, b.run("ctr", args...))
	b.t.Cleanup(func() {
		if b.t.Failed() {
			b.t.Logf("%s:\n%s", name, said(b.t, exec.Command("cat", b.root+"/var/log/"+name)))
		}
	})
	return &pod{b, name}
}

func (p *pod) log() string {
	p.t.Helper()
	return read(p.t, p.root+"/var/log/"+p.name)
}

// ready waits until the readiness probe succeeds.
func (p *pod) ready() {
	p.t.Helper()
	var probes int
	await(p.t, p.name+" is ready", func() error {
		probes++
		out, err := p.booted.run("ctr", "--namespace", "k8s.io", "tasks", "exec", "--exec-id", fmt.Sprint("probe", probes), p.name, "/usr/bin/pilot", "node", "deploy", "--check").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// stop stops the pod as the kubelet does.
func (p *pod) stop() {
	p.t.Helper()
	output(p.t, p.booted.run("ctr", "--namespace", "k8s.io", "tasks", "kill", "--signal", "SIGTERM", p.name))
	await(p.t, p.name+" ends", func() error {
		return p.booted.run("ctr", "--namespace", "k8s.io", "tasks", "delete", p.name).Run()
	})
	output(p.t, p.booted.run("ctr", "--namespace", "k8s.io", "containers", "delete", p.name))
}

// deployedImage makes an image of the programs in dir and imports it on the
// machine.
func (b *booted) deployedImage(dir, tag string) string {
	b.t.Helper()
	out := tempDir(b.t) + "/image"
	build := command(b.t, "go", "run", "-buildvcs=false", ".", "-out", out, "-version", tag, "-user", "0:0", "-license", repo+"/LICENSE", "pilot,pilot-decoder", goarch+"="+dir)
	build.Dir = filepath.Join(repo, "packaging/ociimage")
	output(b.t, build)
	output(b.t, command(b.t, "tar", "-C", out, "-cf", b.root+"/var/tmp/"+tag+".tar", "."))
	output(b.t, b.run("ctr", "--namespace", "k8s.io", "images", "import", "--base-name", "registry.example.com/pilot", "/var/tmp/"+tag+".tar"))
	return "registry.example.com/pilot:" + tag
}

// TestDeploy has a DaemonSet's pod set up a machine that runs, be replaced and
// upgraded, and clean up.
func TestDeploy(t *testing.T) {
	if os.Getenv("PILOT_NODE") == "" {
		t.Skip("boots machines, which takes more than a minute: make test-node")
	}
	c := newCluster(t)
	b := initialized(t, "team-a")
	b.process.stop(t)
	appendTo(t, b.dir+"/copilot.toml", fmt.Sprintf("\n[issuers.cluster]\nurl = %q\naudience = \"copilot\"\nca = %q\n", c.URL, c.dir+"/account/ca.crt"))
	appendTo(t, b.dir+"/policy.toml", "\n[[rule]]\nidentities = [\"cluster:system:serviceaccount:pilot-system:pilot\"]\nkeks = [\"team-*\"]\nactions = [\"unwrap\"]\n")
	b.start(t)
	write(t, c.dir+"/broker/ca.pem", read(t, b.dir+"/ca.pem"))
	dir := tempDir(t)
	_, ociConf := pilot(t, dir+"/ci", "unix://"+b.dir+"/copilot.sock")
	ci := newCI(t, dir+"/ci", ociConf)

	for _, version := range []string{"1.7", "2.4.2"} {
		t.Run(version, func(t *testing.T) {
			m := boot(t, c.dir, func(root string) {
				if version == "2.4.2" {
					for _, name := range []string{"containerd", "containerd-shim-runc-v2", "ctr"} {
						output(t, command(t, "install", filepath.Join(tools, "bin", name), root+"/usr/bin/"+name))
					}
				}
				write(t, root+"/etc/containerd/config.toml", "version = 2\noom_score = 1\n")
			})
			image := m.deployedImage(bin, "v1")
			before := m.files()
			n := &node{t: t, dir: dir, socket: fmt.Sprintf("/proc/%d/root/run/containerd/containerd.sock", m.init)}
			pull := func() {
				t.Helper()
				encrypted := ci.image(kinds[1], "provider:pilot:team-a")
				output(t, n.crictl("pull", encrypted))
				output(t, n.crictl("rmi", encrypted))
			}
			encrypted := ci.image(kinds[1], "provider:pilot:team-a")
			fails(t, n.crictl("pull", encrypted))

			first := m.pod(c, "first", image, b.url())
			first.ready()
			for _, unit := range []string{"pilot.service", "pilot-diff.socket", "pilot-keyprovider.socket"} {
				output(t, m.run("systemctl", "is-active", unit))
				output(t, m.run("systemctl", "is-enabled", unit))
			}
			pull()
			containerd, daemon := m.service("containerd"), m.service("pilot")
			onMachine := fmt.Sprintf("/proc/%d/root/run/pilot/broker-token", m.init)
			if got := read(t, onMachine); got != read(t, c.dir+"/broker/token") {
				t.Errorf("the token on the node is %q", got)
			}

			renewed := c.token(t)
			write(t, c.dir+"/broker/token", renewed)
			await(t, "the new token", func() error {
				if has, err := os.ReadFile(onMachine); err != nil || string(has) != renewed {
					return fmt.Errorf("the node has another: %v", err)
				}
				return nil
			})
			pull()

			// Replaced.
			installed := m.files()
			first.stop()
			if !strings.Contains(first.log(), "pilot stays on this node") {
				t.Errorf("the pod that was replaced says: %s", first.log())
			}
			second := m.pod(c, "second", image, b.url())
			second.ready()
			m.same(installed)
			if now := m.service("containerd"); now != containerd {
				t.Errorf("containerd was restarted: %s, was %s", now, containerd)
			}
			if now := m.service("pilot"); now != daemon {
				t.Errorf("pilot was restarted: %s, was %s", now, daemon)
			}
			second.stop()

			// Upgraded.
			newer := tempDir(t)
			for _, name := range []string{"pilot", "pilot-decoder"} {
				write(t, newer+"/"+name, read(t, bin+"/"+name)+"newer")
			}
			third := m.pod(c, "third", m.deployedImage(newer, "v2"), b.url())
			third.ready()
			if !strings.HasSuffix(read(t, m.root+"/usr/local/bin/pilot"), "newer") {
				t.Error("the program is the old one")
			}
			if now := m.service("containerd"); now != containerd {
				t.Errorf("containerd was restarted: %s, was %s", now, containerd)
			}
			if now := m.service("pilot"); now == daemon || now == "0" {
				t.Errorf("pilot runs the old program: %s, was %s", now, daemon)
			}
			pull()
			third.stop()

			// Cut short between the configuration and the restart.
			output(t, m.run("mkdir", "/run/pilot-restart"))
			output(t, m.run("touch", "/run/pilot-restart/containerd.service"))
			fourth := m.pod(c, "fourth", "registry.example.com/pilot:v2", b.url())
			fourth.ready()
			if now := m.service("containerd"); now == containerd {
				t.Errorf("containerd was not restarted")
			}
			pull()

			// Deleted.
			c.set(object{"uid": "1"}, object{"uid": "2", "deletionTimestamp": "2026-01-01T00:00:00Z"})
			fourth.stop()
			if !strings.Contains(fourth.log(), "pilot is removed from this node") {
				t.Errorf("the pod of the deleted namespace says: %s", fourth.log())
			}
			c.set(object{"uid": "1"}, object{"uid": "2"})
			m.same(before)
			for _, name := range []string{"/usr/local/bin/pilot", "/usr/local/bin/pilot-decoder", "/run/pilot/broker-token", "/etc/pilot"} {
				if _, err := os.Lstat(fmt.Sprintf("/proc/%d/root%s", m.init, name)); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s is left: %v", name, err)
				}
			}
			if now := m.service("pilot"); now != "0" {
				t.Error("pilot still runs")
			}
			fails(t, n.crictl("pull", encrypted))
			output(t, m.run("ctr", "--namespace", "k8s.io", "images", "list"))
		})
	}
}

// set changes what the cluster has.
func (c *cluster) set(daemonSet, namespace object) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.daemonSet, c.namespace = daemonSet, namespace
}

func appendTo(t testing.TB, name, text string) {
	t.Helper()
	write(t, name, read(t, name)+text)
}
