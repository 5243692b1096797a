//go:build kubernetes

package cluster

import (
	"crypto/rand"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// installation is pilot and copilot in a cluster, by the manifests or by the chart.
type installation struct {
	*kubernetes
	ci     *harness.CI
	dir    string
	policy string            // which lets the node's own identity unwrap, and a builder wrap
	before map[string]string // the node's files
	master string
}

// brokerAddress is that of copilot's Service.
const brokerAddress = "10.96.0.200"

// newInstallation starts a cluster for an installation, with a registry that has all
// images, and makes the certificates: of a CA, and a server CA that ca.pem has as well.
func newInstallation(t testing.TB) *installation {
	t.Helper()
	i := &installation{dir: harness.TempDir(t), ci: &harness.CI{Secrets: map[string]string{}}}
	certificates := i.dir + "/certificates"
	harness.Output(t, harness.Command(t, "copilot", "init", "--config-dir", certificates, "--dir", i.dir+"/store", "--host", brokerAddress, "--trust-domain", "example.com"))
	harness.Output(t, harness.Command(t, "copilot", "certs", "server-ca", "--config-dir", certificates, "--host", brokerAddress, "--host", "copilot.copilot-system.svc"))
	master := make([]byte, 32)
	rand.Read(master)
	i.master = string(master)
	i.ci.Registry, i.ci.Storage = harness.StartRegistry(t, i.dir)
	i.ci.Node = harness.NewNode(t, i.dir, harness.Containerd2(), i.dir+"/ocicrypt.conf", "")
	i.kubernetes = newKubernetes(t, i.ci.Pause())
	i.before = i.node.Files()
	pushLayout(i.ci, "pilot", filepath.Join(harness.Repo, "dist/images/pilot"))
	pushLayout(i.ci, "copilot", filepath.Join(harness.Repo, "dist/images/copilot"))
	postgres(i.ci)

	const account = "cluster:system:serviceaccount:pilot-system:pilot"
	rules := harness.Read(t, filepath.Join(harness.Repo, "packaging/kubernetes/copilot/policy.toml"))
	rules = strings.Replace(rules, `"`+account+`"`, `"`+account+`@node/node1"`, 1) // which the node's token has to name
	i.policy = rules + "\n[[rule]]\nidentities = [\"cluster:system:serviceaccount:default:builder\"]\nkeks = [\"**\"]\nactions = [\"wrap\"]\n"
	for _, name := range []string{"postgres", "postgres2"} {
		i.apply(`apiVersion: v1
kind: PersistentVolume
metadata: {name: ` + name + `}
spec:
  capacity: {storage: 2Gi}
  accessModes: [ReadWriteOnce]
  hostPath: {path: /var/lib/kubelet/` + name + `}
`)
		harness.Output(t, i.node.Run("install", "-d", "-o", "999", "/var/lib/kubelet/"+name))
	}
	return i
}

// secrets makes copilot's Secrets in a namespace, with files of the certificates.
func (i *installation) secrets(namespace, cert, key string) {
	i.t.Helper()
	secret := func(args ...string) {
		i.t.Helper()
		harness.Output(i.t, i.kubectl(append([]string{"--namespace", namespace, "create", "secret"}, args...)...))
	}
	secret("generic", "copilot-master-key", "--from-file", "copilot-master-key="+harness.Write(i.t, i.dir+"/master", i.master))
	secret("tls", "copilot-tls", "--cert", i.dir+"/certificates/"+cert, "--key", i.dir+"/certificates/"+key)
	secret("generic", "copilot-postgres", "--from-literal", "password=secret")
	secret("generic", "copilot-database", "--from-literal", "url=postgres://copilot:secret@copilot-postgres/copilot?sslmode=disable")
}

// createKEK makes the KEK team-a by the copilot in a namespace, and starts a machine that
// encrypts with it.
func (i *installation) createKEK(namespace string) {
	i.t.Helper()
	harness.Output(i.t, i.kubectl("--namespace", namespace, "exec", "deployment/copilot", "--", "/usr/bin/copilot", "keys", "create", "team-a"))
	harness.Output(i.t, i.kubectl("create", "serviceaccount", "builder"))
	token := harness.Write(i.t, i.dir+"/token", harness.Output(i.t, i.kubectl("create", "token", "builder", "--audience", "copilot", "--duration", "2h")))
	harness.StartPilot(i.t, i.dir, "https://"+brokerAddress+":8443", "--annotation-format", "copilot", "--broker-ca", i.dir+"/certificates/ca.pem", "--broker-token-file", token)
}

// image returns a new image that is encrypted with team-a, of the layers of that kind.
func (i *installation) image(layers int) string {
	i.t.Helper()
	return i.ci.Image(harness.LayerKinds[layers], "provider:pilot:team-a")
}

// ran runs a pod with an encrypted image until it is done.
func (i *installation) ran(name, image string) {
	i.t.Helper()
	i.apply(runOnce(name, image))
	i.wait("pod/"+name, "jsonpath={.status.phase}=Succeeded")
	if out := harness.Output(i.t, i.kubectl("logs", name)); !strings.Contains(out, i.ci.Secrets[image]) {
		i.t.Errorf("the pod says: %s", out)
	}
}

// removed removes pilot, after which the node has to be as it was, and can't run an
// encrypted image that it does not have yet.
func (i *installation) removed(image string, remove func()) {
	i.t.Helper()
	remove()
	harness.Output(i.t, i.kubectl("--namespace", "pilot-system", "wait", "--for=delete", "pod", "--selector", "app.kubernetes.io/name=pilot", "--timeout", "4m"))
	i.node.CheckFiles(i.before)
	i.apply(runOnce("removed", image))
	i.wait("pod/removed", "jsonpath={.status.containerStatuses[0].state.waiting.reason}=ImagePullBackOff")
}
