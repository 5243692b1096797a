//go:build kubernetes

package cluster

import (
	"encoding/base64"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestNodeTokensOfKubernetes shows copilot the tokens that a real API server makes for
// pilot's pods on two nodes, of which one has the test's address.
func TestNodeTokensOfKubernetes(t *testing.T) {
	ownNetwork(t)
	k := &kubernetes{t: t, dir: harness.TempDir(t)}
	k.apiServer()
	manifests := filepath.Join(harness.Repo, "packaging/kubernetes")
	harness.Output(t, k.kubectl("apply", "--kustomize", manifests+"/namespace"))
	system := func(args ...string) string {
		t.Helper()
		return harness.Output(t, k.kubectl(append([]string{"--namespace", "pilot-system"}, args...)...))
	}
	for _, account := range []string{"pilot", "copilot"} {
		harness.Output(t, k.kubectl("--namespace", account+"-system", "create", "serviceaccount", account))
	}
	for node, address := range map[string]string{"worker-7": "127.0.0.1", "worker-8": "192.0.2.8"} {
		k.apply(fmt.Sprintf(`apiVersion: v1
kind: Node
metadata: {name: %s}
---
apiVersion: v1
kind: Pod
metadata: {name: on-%[1]s, namespace: pilot-system}
spec:
  nodeName: %[1]s
  serviceAccountName: pilot
  containers: [{name: pilot, image: pilot}]
`, node))
		harness.Output(t, k.kubectl("patch", "node", node, "--subresource", "status", "--patch",
			`{"status":{"addresses":[{"type":"InternalIP","address":"`+address+`"},{"type":"Hostname","address":"`+node+`"}]}}`))
	}
	token := func(args ...string) string {
		t.Helper()
		return harness.Write(t, harness.TempDir(t)+"/token", system(append([]string{"create", "token", "--audience", "copilot", "pilot"}, args...)...))
	}
	ofPod := func(node string) string {
		t.Helper()
		return token("--bound-object-kind", "Pod", "--bound-object-name", "on-"+node)
	}

	b := harness.NewTLSBroker(t, "all", "one")
	const account = "cluster:system:serviceaccount:pilot-system:pilot"
	rule := "\n[[rule]]\nidentities = [%q]\nkeks = [%q]\nactions = [\"wrap\"]\n"
	harness.Write(t, b.Dir+"/policy.toml", harness.Read(t, b.Dir+"/policy.toml")+fmt.Sprintf(rule, account, "all")+fmt.Sprintf(rule, account+"@node/worker-7", "one"))
	const issuer = "https://kubernetes.default.svc.cluster.local"
	conf := harness.Read(t, b.Dir+"/copilot.toml") + fmt.Sprintf("\n[issuers.cluster]\nurl = %q\nkeys-url = %q\naudience = \"copilot\"\nca = %q\ntoken-file = %q\n",
		issuer, apiServer+"/openid/v1/jwks", k.dir+"/ca.pem", harness.Write(t, k.dir+"/copilot-token", harness.Output(t, k.kubectl("--namespace", "copilot-system", "create", "token", "copilot"))))
	restart := func(settings string) {
		t.Helper()
		b.Process.Stop(t)
		harness.Write(t, b.Dir+"/copilot.toml", conf+settings)
		b.Start(t)
	}
	restart("")
	// wrap has a node with a token wrap with a KEK.
	wrap := func(token, kek string, want ...string) {
		t.Helper()
		cmd := harness.Command(t, "pilot", "keyprovider", "--broker", b.URL(), "--broker-ca", b.Dir+"/ca.pem", "--broker-token-file", token, "--annotation-format", "copilot")
		cmd.Stdin = strings.NewReader(`{"op":"keywrap","keywrapparams":{"ec":{"Parameters":{"pilot":["` + base64.StdEncoding.EncodeToString([]byte(kek)) + `"]}},"optsdata":"` +
			base64.StdEncoding.EncodeToString([]byte("a layer key")) + `"}}`)
		if len(want) == 0 {
			harness.Output(t, cmd)
		} else {
			harness.ExpectFailure(t, cmd, want...)
		}
	}
	worker7, worker8, nobodys := ofPod("worker-7"), ofPod("worker-8"), token()
	for _, token := range []string{worker7, worker8, nobodys} {
		wrap(token, "all")
	}
	wrap(worker7, "one")
	wrap(worker8, "one", "403", account+"@node/worker-8")
	wrap(nobodys, "one", "403", account+" may not")

	// Revoked for one node, and for all.
	harness.Output(t, b.Command(t, "keys", "revoke", "--identity", account+"@node/worker-8", "all"))
	wrap(worker8, "all", "403")
	wrap(worker7, "all")
	harness.Output(t, b.Command(t, "keys", "revoke", "--identity", account, "all"))
	wrap(worker7, "all", "403")
	harness.Output(t, b.Command(t, "keys", "revoke", "--undo", "--identity", account, "all"))

	// worker-8's token is shown from another machine.
	restart(fmt.Sprintf("nodes-url = %q\n", apiServer+"/api/v1/nodes"))
	wrap(worker7, "all", "503", "can't fetch the addresses of the token's node")
	k.apply(`apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: copilot-nodes}
rules: [{apiGroups: [""], resources: [nodes], verbs: [get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: copilot-nodes}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: copilot-nodes}
subjects: [{kind: ServiceAccount, name: copilot, namespace: copilot-system}]
`)
	harness.Await(t, "copilot's right to read nodes", func() error {
		return k.kubectl("auth", "can-i", "get", "nodes", "--as", "system:serviceaccount:copilot-system:copilot").Run()
	})
	restart(fmt.Sprintf("nodes-url = %q\n", apiServer+"/api/v1/nodes")) // it asks again after five seconds
	wrap(worker7, "all")
	wrap(worker8, "all", "401", "the token is for node worker-8, and 127.0.0.1 is not one of its addresses")
	wrap(nobodys, "all")
}
