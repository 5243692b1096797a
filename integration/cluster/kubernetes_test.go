//go:build kubernetes

package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestKubernetes lets the kubelet pull encrypted images for pods without any setting for
// encryption, and scales deployments on a node that asks about workloads.
func TestKubernetes(t *testing.T) {
	ownNetwork(t)
	b := harness.NewTLSBroker(t, "team-a", "team-b")
	policy := harness.Read(t, b.Dir+"/policy.toml") + "[[rule]]\nidentities = [\"spiffe://example.com/node/*\"]\nkeks = [\"team-b\"]\nactions = [\"unwrap\", \"export\"]\ndeny = true\n"
	harness.Write(t, b.Dir+"/policy.toml", policy)
	dir := harness.TempDir(t)
	_, ociConf := harness.StartPilot(t, dir+"/ci", "unix://"+b.Dir+"/copilot.sock")
	ci := harness.NewCI(t, dir+"/ci", ociConf)
	allowed := ci.Image(harness.LayerKinds[1], "provider:pilot:team-a")
	denied := ci.Image(harness.LayerKinds[2], "provider:pilot:team-b")

	began := time.Now()
	pause := ci.Pause()
	k := newKubernetes(t, pause)
	t.Logf("the node is ready after %v", time.Since(began))
	k.node.AddProgram(filepath.Join(harness.Bin, "pilot"))
	cert, key := b.Enroll(t, "node1")
	for from, to := range map[string]string{cert: "node.pem", key: "node-key.pem", b.Dir + "/ca.pem": "ca.pem"} {
		harness.Write(t, k.node.Root+"/etc/pilot/"+to, harness.Read(t, from))
	}
	harness.Output(t, k.node.Run("pilot", "node", "install", "--now", "--broker", b.URL(),
		"--broker-ca", "/etc/pilot/ca.pem", "--broker-cert", "/etc/pilot/node.pem", "--broker-key", "/etc/pilot/node-key.pem"))

	began = time.Now()
	k.apply(runOnce("allowed", allowed))
	k.wait("pod/allowed", "jsonpath={.status.phase}=Succeeded")
	t.Logf("the pod is done after %v", time.Since(began))
	if out := harness.Output(t, k.kubectl("logs", "allowed")); !strings.Contains(out, ci.Secrets[allowed]) {
		t.Errorf("the pod says: %s", out)
	}

	k.apply(runOnce("denied", denied))
	k.wait("pod/denied", "jsonpath={.status.containerStatuses[0].state.waiting.reason}=ImagePullBackOff")
	events := harness.Output(t, k.kubectl("events", "--for", "pod/denied"))
	t.Log(events)
	for _, want := range []string{`KEK "team-b"`, "spiffe://example.com/node/node1"} {
		if !strings.Contains(events, want) {
			t.Errorf("want %q in\n%s", want, events)
		}
	}
	harness.Write(t, b.Dir+"/policy.toml", strings.Replace(policy, "deny = true", "", 1))
	k.wait("pod/denied", "jsonpath={.status.phase}=Succeeded")
	if out := harness.Output(t, k.kubectl("logs", "denied")); !strings.Contains(out, ci.Secrets[denied]) {
		t.Errorf("the pod says: %s", out)
	}
	testWorkloads(t, k, b, allowed, denied, pause) // no subtest, whose thread has another network
}

// TestKubernetesManifests installs packaging/kubernetes as its example does: copilot with
// PostgreSQL, and a DaemonSet that sets up the node, which has the identity of its service
// account. First all of it is in one namespace, as it was in earlier releases.
func TestKubernetesManifests(t *testing.T) {
	t.Parallel()
	ownNetwork(t)
	i := newInstallation(t)
	k, ci, dir := i.kubernetes, i.ci, i.dir

	// Values that a user fills in.
	harness.Output(t, harness.Command(t, "cp", "-r", filepath.Join(harness.Repo, "packaging/kubernetes"), dir+"/manifests"))
	harness.Write(t, dir+"/manifests/example/ca.pem", harness.Read(t, dir+"/certificates/ca.pem"))
	kustomization := dir + "/manifests/example/kustomization.yaml"
	harness.Write(t, kustomization, strings.NewReplacer("registry.example.com", ci.Registry, "docker.io/library", ci.Registry, "newTag: v1", "newTag: test", `newTag: "17"`, "newTag: test").Replace(harness.Read(t, kustomization)))
	harness.Write(t, dir+"/manifests/copilot/policy.toml", i.policy)

	// The earlier release had no admission policy, and a certificate for a year.
	harness.Output(t, harness.Command(t, "cp", "-r", dir+"/manifests", dir+"/earlier"))
	harness.Output(t, harness.Command(t, "sh", "-ec", `
		sed -i 's/copilot-system/pilot-system/' $(grep -rl copilot-system "$0")
		sed -i /admission/d "$0/example/kustomization.yaml"`, dir+"/earlier"))
	harness.Output(t, k.kubectl("create", "namespace", "pilot-system"))
	i.secrets("pilot-system", "server.pem", "server-key.pem")
	harness.Output(t, k.kubectl("apply", "--kustomize", dir+"/earlier/example"))
	k.rolledOutIn("pilot-system", "statefulset/copilot-postgres")
	k.nameServices()
	k.rolledOutIn("pilot-system", "deployment/copilot")
	k.rolledOut("daemonset/pilot")
	i.createKEK("pilot-system")
	i.ran("earlier", i.image(0))

	// As docs/kubernetes.md says.
	harness.Output(t, k.kubectl("apply", "--kustomize", dir+"/manifests/namespace"))
	move := harness.Command(t, "sh", "-ec", `
		for secret in copilot-tls copilot-master-key copilot-database copilot-postgres; do
			kubectl -n pilot-system get secret $secret -o json |
				jq '{apiVersion, kind, type, data, metadata: {name: .metadata.name}}' |
				kubectl -n copilot-system apply -f -
		done
		kubectl apply -k kubernetes/example -l app.kubernetes.io/name=copilot-postgres
		kubectl -n copilot-system rollout status statefulset/copilot-postgres --timeout 4m
		kubectl -n pilot-system delete --cascade=foreground deployment/copilot service/copilot
		kubectl -n pilot-system exec copilot-postgres-0 -- pg_dump --username=copilot copilot >copilot.sql
		kubectl -n copilot-system exec -i copilot-postgres-0 -- psql --username=copilot --quiet --set=ON_ERROR_STOP=1 copilot <copilot.sql
		kubectl apply -k kubernetes/example`)
	harness.Output(t, harness.Command(t, "ln", "-s", "manifests", dir+"/kubernetes"))
	kubectl := k.kubectl()
	harness.Write(t, dir+"/bin/kubectl", "#!/bin/sh\nexec "+strings.Join(kubectl.Args, " ")+` "$@"`+"\n")
	if err := os.Chmod(dir+"/bin/kubectl", 0o755); err != nil {
		t.Fatal(err)
	}
	move.Dir, move.Env = dir, append(os.Environ(), "PATH="+dir+"/bin:"+os.Getenv("PATH"))
	began := time.Now()
	harness.Output(t, move)
	k.nameServices()
	k.rolledOut("deployment/copilot")
	t.Logf("copilot is in its own namespace after %v", time.Since(began))
	i.ran("moved", i.image(1))
	harness.Output(t, k.kubectl("--namespace", "pilot-system", "delete", "statefulset,service,networkpolicy", "copilot-postgres"))

	containerd := k.node.PID("containerd")
	harness.Output(t, k.kubectl("--namespace", "pilot-system", "rollout", "restart", "daemonset/pilot"))
	k.rolledOut("daemonset/pilot")
	if pid := k.node.PID("containerd"); pid != containerd {
		t.Errorf("containerd was restarted: its process is %s, was %s", pid, containerd)
	}
	i.ran("restarted", i.image(1))

	// A new version is rolled out while the node reboots. The token in /run is gone, and the
	// image that writes it again has to be pulled first.
	was := harness.Output(t, k.node.Run("pilot", "--version"))
	pushLayout(ci, "pilot-next", nextPilot(t, dir))
	k.reboot(func() {
		harness.Output(t, k.kubectl("--namespace", "pilot-system", "set", "image", "daemonset/pilot", "pilot="+ci.Registry+"/pilot-next:test"))
	})
	k.rolledOut("daemonset/pilot")
	if is := harness.Output(t, k.node.Run("pilot", "--version")); is == was || !strings.Contains(is, "next") {
		t.Errorf("the node has pilot %s, had %s", is, was)
	}
	harness.Await(t, "copilot's database under its new address", func() error {
		k.nameServices()
		return k.kubectl("--namespace", "copilot-system", "exec", "deployment/copilot", "--", "/usr/bin/copilot", "keys", "show", "team-a").Run()
	})
	k.rolledOut("deployment/copilot")
	i.ran("upgraded", i.image(2))
	i.removed(i.image(2), func() { harness.Output(t, k.kubectl("delete", "--kustomize", dir+"/manifests/pilot")) })
}

// nextPilot builds the image of another version of pilot, as "make images" does, and
// returns its layout.
func nextPilot(t testing.TB, dir string) string {
	t.Helper()
	build := harness.Command(t, "go", "build", "-buildvcs=false", "-ldflags", "-X github.com/ctrlplane/pilot/internal/version.Version=next", "-tags", "no_pkcs11", "-o", dir+"/next/", "./cmd/pilot", "./cmd/pilot-decoder")
	build.Dir, build.Env = harness.Repo, append(os.Environ(), "CGO_ENABLED=0")
	harness.Output(t, build)
	harness.Output(t, harness.Command(t, filepath.Join(harness.Repo, "dist/ociimage"), "-license", filepath.Join(harness.Repo, "LICENSE"), "-out", dir+"/next-image", "-user", "0:0", "pilot,pilot-decoder", harness.Arch+"="+dir+"/next"))
	return dir + "/next-image"
}

// rolledOut waits until a workload is rolled out, in its namespace.
func (k *kubernetes) rolledOut(what string) {
	k.t.Helper()
	namespace := "copilot-system"
	if what == "daemonset/pilot" {
		namespace = "pilot-system"
	}
	k.rolledOutIn(namespace, what)
}

func (k *kubernetes) rolledOutIn(namespace, what string) {
	k.t.Helper()
	system := func(args ...string) *exec.Cmd {
		return k.kubectl(append([]string{"--namespace", namespace}, args...)...)
	}
	var out string
	for range 3 { // a command has five minutes
		cmd := system("rollout", "status", what, "--timeout", "4m")
		if out = harness.CombinedOutput(k.t, cmd); cmd.ProcessState.Success() {
			return
		}
	}
	k.t.Fatalf("%s\n%s\n%s\n%s", out, harness.CombinedOutput(k.t, system("describe", "pods")), harness.CombinedOutput(k.t, system("logs", what, "--prefix", "--all-containers")), k.journal())
}

// pushLayout pushes an image from an OCI layout.
func pushLayout(c *harness.CI, name, layout string) {
	c.T.Helper()
	name = c.Registry + "/" + name + ":test"
	harness.Output(c.T, harness.Command(c.T, "tar", "--create", "--file", c.Dir+"/layout.tar", "--directory", layout, "."))
	harness.Output(c.T, c.CtrPilot("images", "import", "--no-unpack", "--index-name", name, c.Dir+"/layout.tar"))
	harness.Output(c.T, c.CtrPilot("images", "push", "--plain-http", name))
}

// postgres pushes an image of Debian's PostgreSQL that is configured like Docker's official
// image.
func postgres(c *harness.CI) {
	t := c.T
	t.Helper()
	programs, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil || len(programs) == 0 {
		t.Fatal("there is no PostgreSQL")
	}
	version := filepath.Base(filepath.Dir(programs[0]))
	list := harness.Output(t, harness.Command(t, "sh", "-ec", `
		find /usr/lib/postgresql/$0/bin /usr/lib/postgresql/$0/lib /usr/share/postgresql/$0 -type f ! -path '*/bitcode/*' ! -name 'llvmjit*'
		cd /usr/lib/postgresql/$0 && ldd bin/postgres bin/initdb bin/pg_isready bin/pg_dump bin/psql lib/*.so | grep -v llvm | grep -o '/lib[^ ]*' | grep -v :$ | sort -u`, version))
	files := map[string][]byte{
		"bin/sh":     []byte(harness.Read(t, "/bin/busybox")),
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
		files[strings.TrimPrefix(file, "/")] = []byte(harness.Read(t, file))
	}
	l := harness.NewLayout(t)
	layer, diffID := l.Layer(harness.LayerKinds[0], harness.LayerKinds[0].OCI, files)
	config := l.JSON("application/vnd.oci.image.config.v1+json", harness.Object{
		"architecture": harness.Arch, "os": "linux", "rootfs": harness.Object{"type": "layers", "diff_ids": []string{diffID}},
		"config": harness.Object{"Entrypoint": []string{"/entrypoint"}, "Env": []string{"PATH=/bin:" + programs[0]}},
	})
	manifest := l.JSON("application/vnd.oci.image.manifest.v1+json", harness.Object{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": []harness.Object{layer},
	})
	name := c.Registry + "/postgres:test"
	harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", l.Tar(c.Dir+"/image.tar", name, manifest)))
	harness.Output(t, c.CtrPilot("images", "push", "--plain-http", name))
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
