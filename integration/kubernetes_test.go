//go:build kubernetes

// These tests run a Kubernetes of their own: see cluster_test.go. They take a
// program that is long to build: "make test-kubernetes".

package integration

import (
	"fmt"
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
	c := newCluster(t, ci.pause())
	t.Logf("the node is ready after %v", time.Since(began))
	cert, key := b.enroll(t, "node1")
	for from, to := range map[string]string{cert: "node.pem", key: "node-key.pem", b.dir + "/ca.pem": "ca.pem"} {
		write(t, c.node.root+"/etc/pilot/"+to, read(t, from))
	}
	output(t, c.node.run("pilot", "node", "install", "--now", "--broker", b.url(),
		"--broker-ca", "/etc/pilot/ca.pem", "--broker-cert", "/etc/pilot/node.pem", "--broker-key", "/etc/pilot/node-key.pem"))

	began = time.Now()
	c.apply(pod("allowed", allowed))
	c.wait("pod/allowed", "jsonpath={.status.phase}=Succeeded")
	t.Logf("the pod is done after %v", time.Since(began))
	if out := output(t, c.kubectl("logs", "allowed")); !strings.Contains(out, ci.secrets[allowed]) {
		t.Errorf("the pod says: %s", out)
	}

	c.apply(pod("denied", denied))
	c.wait("pod/denied", "jsonpath={.status.containerStatuses[0].state.waiting.reason}=ImagePullBackOff")
	events := output(t, c.kubectl("events", "--for", "pod/denied"))
	t.Log(events)
	for _, want := range []string{`KEK "team-b"`, "spiffe://example.com/node/node1"} {
		if !strings.Contains(events, want) {
			t.Errorf("want %q in\n%s", want, events)
		}
	}
	write(t, b.dir+"/policy.toml", strings.Replace(policy, "deny = true", "", 1))
	c.wait("pod/denied", "jsonpath={.status.phase}=Succeeded")
	if out := output(t, c.kubectl("logs", "denied")); !strings.Contains(out, ci.secrets[denied]) {
		t.Errorf("the pod says: %s", out)
	}
}

// pod is the manifest of a pod that runs an image once.
func pod(name, image string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  restartPolicy: OnFailure
  containers: [{name: app, image: '%s'}]
`, name, image)
}
