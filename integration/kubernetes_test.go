//go:build kubernetes

// These tests run a Kubernetes of their own: see cluster_test.go. They take a
// program that is long to build: "make test-kubernetes".

package integration

import (
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestKubernetes has the kubelet pull encrypted images for pods in which
// nothing tells of encryption.
func TestKubernetes(t *testing.T) {
	ownNetwork(t)
	b := initialized(t, "team-a", "team-b")
	policy := read(t, b.dir+"/policy.toml") + "[[rule]]\nidentities = [\"spiffe://example.com/node/*\"]\nkeks = [\"team-b\"]\nactions = [\"unwrap\", \"export\"]\ndeny = true\n"
	write(t, b.dir+"/policy.toml", policy)
	dir := tempDir(t)
	_, ociConf := pilot(t, dir+"/ci", "unix://"+b.dir+"/copilot.sock")
	ci := newCI(t, dir+"/ci", ociConf)
	allowed := ci.image(kinds[1], "provider:pilot:team-a")
	denied := ci.image(kinds[2], "provider:pilot:team-b")

	began := time.Now()
	k := newKubernetes(t, ci.pause())
	t.Logf("the node is ready after %v", time.Since(began))
	k.node.copy(filepath.Join(bin, "pilot"))
	cert, key := b.enroll(t, "node1")
	for from, to := range map[string]string{cert: "node.pem", key: "node-key.pem", b.dir + "/ca.pem": "ca.pem"} {
		write(t, k.node.root+"/etc/pilot/"+to, read(t, from))
	}
	output(t, k.node.run("pilot", "node", "install", "--now", "--broker", b.url(),
		"--broker-ca", "/etc/pilot/ca.pem", "--broker-cert", "/etc/pilot/node.pem", "--broker-key", "/etc/pilot/node-key.pem"))

	began = time.Now()
	k.apply(runOnce("allowed", allowed))
	k.wait("pod/allowed", "jsonpath={.status.phase}=Succeeded")
	t.Logf("the pod is done after %v", time.Since(began))
	if out := output(t, k.kubectl("logs", "allowed")); !strings.Contains(out, ci.secrets[allowed]) {
		t.Errorf("the pod says: %s", out)
	}

	k.apply(runOnce("denied", denied))
	k.wait("pod/denied", "jsonpath={.status.containerStatuses[0].state.waiting.reason}=ImagePullBackOff")
	events := output(t, k.kubectl("events", "--for", "pod/denied"))
	t.Log(events)
	for _, want := range []string{`KEK "team-b"`, "spiffe://example.com/node/node1"} {
		if !strings.Contains(events, want) {
			t.Errorf("want %q in\n%s", want, events)
		}
	}
	write(t, b.dir+"/policy.toml", strings.Replace(policy, "deny = true", "", 1))
	k.wait("pod/denied", "jsonpath={.status.phase}=Succeeded")
	if out := output(t, k.kubectl("logs", "denied")); !strings.Contains(out, ci.secrets[denied]) {
		t.Errorf("the pod says: %s", out)
	}
}

// TestKubernetesManifests installs all of packaging/kubernetes as its example
// does: copilot with PostgreSQL, and a DaemonSet that sets the node up, whose
// identity is that of its service account.
func TestKubernetesManifests(t *testing.T) {
	t.Parallel()
	ownNetwork(t)
	dir := tempDir(t)
	const broker = "https://10.96.0.200:8443" // the example's
	output(t, command(t, "copilot", "init", "--config-dir", dir+"/copilot", "--host", "10.96.0.200", "--trust-domain", "example.com"))
	ci := &ci{secrets: map[string]string{}}
	ci.registry, ci.storage = registry(t, dir)
	ci.node = newNode(t, dir, containerd2(), dir+"/ocicrypt.conf", "")
	k := newKubernetes(t, ci.pause())
	before := k.node.files()

	// What a user fills in.
	output(t, command(t, "cp", "-r", filepath.Join(repo, "packaging/kubernetes"), dir+"/manifests"))
	write(t, dir+"/manifests/example/ca.pem", read(t, dir+"/copilot/ca.pem"))
	kustomization := dir + "/manifests/example/kustomization.yaml"
	write(t, kustomization, strings.NewReplacer("registry.example.com", ci.registry, "docker.io/library", ci.registry, "newTag: v1", "newTag: test", `newTag: "17"`, "newTag: test").Replace(read(t, kustomization)))
	policy := dir + "/manifests/copilot/policy.toml"
	write(t, policy, read(t, policy)+"[[rule]]\nidentities = [\"cluster:system:serviceaccount:default:builder\"]\nkeks = [\"**\"]\nactions = [\"wrap\"]\n")
	ci.pushLayout("pilot", filepath.Join(repo, "dist/images/pilot"))
	ci.pushLayout("copilot", filepath.Join(repo, "dist/images/copilot"))
	ci.postgres()
	output(t, k.kubectl("apply", "--kustomize", dir+"/manifests/namespace"))
	secret := func(name string, args ...string) {
		t.Helper()
		output(t, k.kubectl(append([]string{"--namespace", "pilot-system", "create", "secret", "generic", name}, args...)...))
	}
	master := make([]byte, 32)
	rand.Read(master)
	secret("copilot-master-key", "--from-file", "copilot-master-key="+write(t, dir+"/master", string(master)))
	secret("copilot-tls", "--from-file", "tls.crt="+dir+"/copilot/server.pem", "--from-file", "tls.key="+dir+"/copilot/server-key.pem")
	secret("copilot-postgres", "--from-literal", "password=secret")
	secret("copilot-database", "--from-literal", "url=postgres://copilot:secret@copilot-postgres/copilot?sslmode=disable")
	k.apply(`apiVersion: v1
kind: PersistentVolume
metadata: {name: postgres}
spec:
  capacity: {storage: 2Gi}
  accessModes: [ReadWriteOnce]
  hostPath: {path: /var/lib/kubelet/postgres}
`)
	output(t, k.node.run("install", "-d", "-o", "999", "/var/lib/kubelet/postgres"))

	began := time.Now()
	output(t, k.kubectl("apply", "--kustomize", dir+"/manifests/example"))
	k.rolledOut("statefulset/copilot-postgres")
	k.nameServices()
	k.rolledOut("deployment/copilot")
	k.rolledOut("daemonset/pilot")
	t.Logf("all is rolled out after %v", time.Since(began))

	output(t, k.kubectl("--namespace", "pilot-system", "exec", "deployment/copilot", "--", "/usr/bin/copilot", "keys", "create", "team-a"))
	output(t, k.kubectl("create", "serviceaccount", "builder"))
	token := write(t, dir+"/token", output(t, k.kubectl("create", "token", "builder", "--audience", "copilot")))
	pilot(t, dir, broker, "--annotation-format", "copilot", "--broker-ca", dir+"/copilot/ca.pem", "--broker-token-file", token)
	runs := func(name string, layers kind) {
		t.Helper()
		image := ci.image(layers, "provider:pilot:team-a")
		k.apply(runOnce(name, image))
		k.wait("pod/"+name, "jsonpath={.status.phase}=Succeeded")
		if out := output(t, k.kubectl("logs", name)); !strings.Contains(out, ci.secrets[image]) {
			t.Errorf("the pod says: %s", out)
		}
	}
	runs("installed", kinds[0])

	containerd := k.node.pid("containerd")
	output(t, k.kubectl("--namespace", "pilot-system", "rollout", "restart", "daemonset/pilot"))
	k.rolledOut("daemonset/pilot")
	if pid := k.node.pid("containerd"); pid != containerd {
		t.Errorf("containerd was restarted: its process is %s, was %s", pid, containerd)
	}
	runs("restarted", kinds[1])

	// While the node reboots there comes a new version. The token is gone, since it
	// is in /run, and the image that brings it anew has to be pulled first.
	was := output(t, k.node.run("pilot", "--version"))
	ci.pushLayout("pilot-next", nextPilot(t, dir))
	k.reboot(func() {
		output(t, k.kubectl("--namespace", "pilot-system", "set", "image", "daemonset/pilot", "pilot="+ci.registry+"/pilot-next:test"))
	})
	k.rolledOut("daemonset/pilot")
	if is := output(t, k.node.run("pilot", "--version")); is == was || !strings.Contains(is, "next") {
		t.Errorf("the node has pilot %s, had %s", is, was)
	}
	await(t, "copilot's database under its new address", func() error {
		k.nameServices()
		return k.kubectl("--namespace", "pilot-system", "exec", "deployment/copilot", "--", "/usr/bin/copilot", "keys", "show", "team-a").Run()
	})
	k.rolledOut("deployment/copilot")
	runs("upgraded", kinds[2])

	late := ci.image(kinds[2], "provider:pilot:team-a")
	output(t, k.kubectl("delete", "--kustomize", dir+"/manifests/pilot"))
	output(t, k.kubectl("--namespace", "pilot-system", "wait", "--for=delete", "pod", "--selector", "app.kubernetes.io/name=pilot", "--timeout", "4m"))
	k.node.same(before)
	k.apply(runOnce("removed", late))
	k.wait("pod/removed", "jsonpath={.status.containerStatuses[0].state.waiting.reason}=ImagePullBackOff")
}

// nextPilot makes the image of another version of pilot, as "make images" does,
// and returns its layout.
func nextPilot(t testing.TB, dir string) string {
	t.Helper()
	build := command(t, "go", "build", "-buildvcs=false", "-ldflags", "-X github.com/ctrlplane/pilot/version.Version=next", "-tags", "no_pkcs11", "-o", dir+"/next/", "./cmd/pilot", "./cmd/pilot-decoder")
	build.Dir, build.Env = repo, append(os.Environ(), "CGO_ENABLED=0")
	output(t, build)
	output(t, command(t, filepath.Join(repo, "dist/ociimage"), "-license", filepath.Join(repo, "LICENSE"), "-out", dir+"/next-image", "-user", "0:0", "pilot,pilot-decoder", goarch+"="+dir+"/next"))
	return dir + "/next-image"
}

// rolledOut waits until what is rolled out is ready.
func (k *kubernetes) rolledOut(what string) {
	k.t.Helper()
	system := func(args ...string) *exec.Cmd {
		return k.kubectl(append([]string{"--namespace", "pilot-system"}, args...)...)
	}
	var out string
	for range 3 { // a command has five minutes
		cmd := system("rollout", "status", what, "--timeout", "4m")
		if out = said(k.t, cmd); cmd.ProcessState.Success() {
			return
		}
	}
	k.t.Fatalf("%s\n%s\n%s\n%s", out, said(k.t, system("describe", "pods")), said(k.t, system("logs", what, "--prefix", "--all-containers")), k.journal())
}

// pushLayout pushes an image from an OCI layout.
func (c *ci) pushLayout(name, layout string) {
	c.t.Helper()
	name = c.registry + "/" + name + ":test"
	output(c.t, command(c.t, "tar", "--create", "--file", c.dir+"/layout.tar", "--directory", layout, "."))
	output(c.t, c.ctrPilot("images", "import", "--no-unpack", "--index-name", name, c.dir+"/layout.tar"))
	output(c.t, c.ctrPilot("images", "push", "--plain-http", name))
}

// postgres pushes an image of Debian's PostgreSQL that is told what to do as
// Docker's official one is.
func (c *ci) postgres() {
	t := c.t
	t.Helper()
	programs, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil || len(programs) == 0 {
		t.Fatal("there is no PostgreSQL")
	}
	version := filepath.Base(filepath.Dir(programs[0]))
	list := output(t, command(t, "sh", "-ec", `
		find /usr/lib/postgresql/$0/bin /usr/lib/postgresql/$0/lib /usr/share/postgresql/$0 -type f ! -path '*/bitcode/*' ! -name 'llvmjit*'
		cd /usr/lib/postgresql/$0 && ldd bin/postgres bin/initdb bin/pg_isready lib/*.so | grep -v llvm | grep -o '/lib[^ ]*' | grep -v :$ | sort -u`, version))
	files := map[string][]byte{
		"bin/sh":     []byte(read(t, "/bin/busybox")),
		"etc/passwd": []byte("postgres:x:999:999::/:/bin/sh\n"),
		"entrypoint": []byte(`#!/bin/sh
set -e
if [ ! -e "$PGDATA" ]; then
	initdb --username="$POSTGRES_USER" --pwfile="$POSTGRES_PASSWORD_FILE" --auth-host=scram-sha-256 --pgdata="$PGDATA"
	echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
	echo "CREATE DATABASE $POSTGRES_USER" | postgres --single postgres
fi
exec postgres -c listen_addresses=*
`),
	}
	for _, file := range strings.Fields(list) {
		files[strings.TrimPrefix(file, "/")] = []byte(read(t, file))
	}
	l := newLayout(t)
	layer, diffID := l.layer(kinds[0], kinds[0].oci, files)
	config := l.json("application/vnd.oci.image.config.v1+json", object{
		"architecture": goarch, "os": "linux", "rootfs": object{"type": "layers", "diff_ids": []string{diffID}},
		"config": object{"Entrypoint": []string{"/entrypoint"}, "Env": []string{"PATH=/bin:" + programs[0]}},
	})
	manifest := l.json("application/vnd.oci.image.manifest.v1+json", object{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": []object{layer},
	})
	name := c.registry + "/postgres:test"
	output(t, c.ctrPilot("images", "import", "--no-unpack", l.tar(c.dir+"/image.tar", name, manifest)))
	output(t, c.ctrPilot("images", "push", "--plain-http", name))
}

// runOnce is the manifest of a pod that runs an image once.
func runOnce(name, image string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  restartPolicy: OnFailure
  containers: [{name: app, image: '%s'}]
`, name, image)
}
