//go:build kubernetes

// These tests run a Kubernetes of their own: see cluster_test.go. They take a
// program that is long to build: "make test-kubernetes".

package integration

import (
	"fmt"
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

// TestKubernetesDaemonSet has a DaemonSet install pilot, whose identity is that
// of its service account, and remove it.
func TestKubernetesDaemonSet(t *testing.T) {
	ownNetwork(t)
	b := initialized(t, "team-a")
	dir := tempDir(t)
	_, ociConf := pilot(t, dir+"/ci", "unix://"+b.dir+"/copilot.sock")
	ci := newCI(t, dir+"/ci", ociConf)
	images := []string{ci.image(kinds[0], "provider:pilot:team-a"), ci.image(kinds[1], "provider:pilot:team-a"), ci.image(kinds[2], "provider:pilot:team-a")}
	pilotImage := ci.pushLayout("pilot")
	k := newKubernetes(t, ci.pause())
	before := k.node.files()

	token := write(t, k.dir+"/copilot-token", output(t, k.kubectl("create", "token", "default")))
	write(t, b.dir+"/copilot.toml", read(t, b.dir+"/copilot.toml")+fmt.Sprintf(`[issuers.cluster]
url = "https://kubernetes.default.svc.cluster.local"
keys-url = "%s/openid/v1/jwks"
audience = "copilot"
ca = "%s/ca.pem"
token-file = "%s"
`, apiServer, k.dir, token))
	write(t, b.dir+"/policy.toml", `[[rule]]
identities = ["cluster:system:serviceaccount:pilot-system:pilot"]
keks = ["team-a"]
actions = ["unwrap"]
`)
	b.process.stop(t)
	b.start(t)

	k.apply(fmt.Sprintf(`apiVersion: v1
kind: Namespace
metadata: {name: pilot-system}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: pilot, namespace: pilot-system}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: pilot}
rules:
- {apiGroups: [apps], resources: [daemonsets], resourceNames: [pilot], verbs: [get]}
- {apiGroups: [""], resources: [namespaces], resourceNames: [pilot-system], verbs: [get]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: pilot}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: pilot}
subjects: [{kind: ServiceAccount, name: pilot, namespace: pilot-system}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: copilot-ca, namespace: pilot-system}
data: {ca.pem: %q}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: pilot, namespace: pilot-system}
spec:
  selector: {matchLabels: {app: pilot}}
  template:
    metadata: {labels: {app: pilot}}
    spec:
      hostPID: true
      serviceAccountName: pilot
      containers:
      - name: pilot
        image: '%s'
        args: [node, deploy, --broker, '%s', --broker-ca-from, /run/broker/ca.pem, --broker-token-from, /run/broker/token]
        env: [{name: POD_NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}]
        securityContext: {privileged: true}
        readinessProbe: {exec: {command: [/pilot, node, deploy, --check]}, periodSeconds: 1}
        volumeMounts: [{name: broker, mountPath: /run/broker}]
      volumes:
      - name: broker
        projected:
          sources:
          - serviceAccountToken: {path: token, audience: copilot, expirationSeconds: 600}
          - configMap: {name: copilot-ca}
`, read(t, b.dir+"/ca.pem"), pilotImage, b.url()))
	k.rolledOut()
	runs := func(name, image string) {
		t.Helper()
		k.apply(runOnce(name, image))
		k.wait("pod/"+name, "jsonpath={.status.phase}=Succeeded")
		if out := output(t, k.kubectl("logs", name)); !strings.Contains(out, ci.secrets[image]) {
			t.Errorf("the pod says: %s", out)
		}
	}
	runs("installed", images[0])
	if audit := read(t, b.dir+"/store/audit.log"); !strings.Contains(audit, `"who":"cluster:system:serviceaccount:pilot-system:pilot"`) {
		t.Errorf("the audit log: %s", audit)
	}

	containerd := output(t, k.node.run("systemctl", "show", "--property", "MainPID", "containerd"))
	output(t, k.kubectl("--namespace", "pilot-system", "rollout", "restart", "daemonset/pilot"))
	k.rolledOut()
	if pid := output(t, k.node.run("systemctl", "show", "--property", "MainPID", "containerd")); pid != containerd {
		t.Errorf("containerd was restarted: %s, was %s", pid, containerd)
	}
	runs("restarted", images[1])

	output(t, k.kubectl("--namespace", "pilot-system", "delete", "daemonset/pilot", "--timeout", "50s"))
	output(t, k.kubectl("--namespace", "pilot-system", "wait", "--for", "delete", "pods", "--selector", "app=pilot", "--timeout", "50s"))
	k.node.same(before)
	k.apply(runOnce("removed", images[2]))
	k.wait("pod/removed", "jsonpath={.status.containerStatuses[0].state.waiting.reason}=ImagePullBackOff")
}

// rolledOut waits until the DaemonSet's pods are ready.
func (k *kubernetes) rolledOut() {
	k.t.Helper()
	if out, err := k.kubectl("--namespace", "pilot-system", "rollout", "status", "daemonset/pilot", "--timeout", "50s").CombinedOutput(); err != nil {
		k.t.Fatalf("%s\n%s\n%s", out, said(k.t, k.kubectl("--namespace", "pilot-system", "describe", "pods")), said(k.t, k.kubectl("--namespace", "pilot-system", "logs", "daemonset/pilot")))
	}
}

// pushLayout pushes an image that "make images" built, and returns its name.
func (c *ci) pushLayout(image string) string {
	c.t.Helper()
	name := c.registry + "/" + image + ":test"
	output(c.t, command(c.t, "tar", "--create", "--file", c.dir+"/layout.tar", "--directory", filepath.Join(repo, "dist/images", image), "."))
	output(c.t, c.ctrPilot("images", "import", "--no-unpack", "--index-name", name, c.dir+"/layout.tar"))
	output(c.t, c.ctrPilot("images", "push", "--plain-http", name))
	return name
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
