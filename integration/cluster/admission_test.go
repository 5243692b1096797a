//go:build kubernetes

package cluster

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestKubernetesTenants has a real API server decide what others than cluster admins may do
// in pilot's namespace and in copilot's.
func TestKubernetesTenants(t *testing.T) {
	t.Parallel()
	ownNetwork(t)
	k := &kubernetes{t: t, dir: harness.TempDir(t)}
	k.apiServer()
	k.program("kube-controller-manager", "--kubeconfig", k.dir+"/admin.conf", "--leader-elect=false", "--use-service-account-credentials",
		"--service-account-private-key-file", k.dir+"/service-accounts.pem", "--root-ca-file", k.dir+"/ca.pem")
	for _, node := range []string{"worker-7", "worker-8"} {
		k.apply("apiVersion: v1\nkind: Node\nmetadata: {name: " + node + "}\n")
		harness.Output(t, k.kubectl("patch", "node", node, "--subresource", "status", "--patch", `{"status":{"conditions":[{"type":"Ready","status":"True"}],"allocatable":{"pods":"9","cpu":"4","memory":"8Gi"}}}`))
		harness.Output(t, k.kubectl("label", "node", node, "kubernetes.io/os=linux"))
	}
	manifests := filepath.Join(harness.Repo, "packaging/kubernetes")
	harness.Output(t, k.kubectl("apply", "--kustomize", manifests+"/namespace"))
	harness.Output(t, k.kubectl("apply", "--kustomize", manifests+"/example"))

	// Both of their pods are accepted in their namespaces.
	count := func(namespace, app string, want int) {
		t.Helper()
		harness.Await(t, app+"'s pods", func() error {
			names := strings.Fields(harness.Output(t, k.kubectl("--namespace", namespace, "get", "pods", "--selector", "app.kubernetes.io/name="+app, "--output", "name")))
			if len(names) != want {
				return fmt.Errorf("%d pods, want %d", len(names), want)
			}
			return nil
		})
	}
	count("pilot-system", "pilot", 2)
	count("copilot-system", "copilot", 2)
	count("copilot-system", "copilot-postgres", 1)
	// Helm takes over what kustomize has installed.
	harness.Output(t, k.helm("install", "pilot", manifests+"/chart", "--take-ownership", "--force-conflicts", "--set", "images.registry=registry.example.com",
		"--set", "copilot.service.clusterIP=10.96.0.200,copilot.postgres.enabled=true", "--set-file", "broker.ca="+manifests+"/example/ca.pem"))

	// Without a scheduler, no pod of the DaemonSet gets to its node.
	k.apply(`apiVersion: v1
kind: Pod
metadata: {name: on-worker-7, namespace: pilot-system}
spec:
  nodeName: worker-7
  serviceAccountName: pilot
  containers: [{name: pilot, image: pilot, volumeMounts: [{name: token, mountPath: /run/broker}]}]
  volumes: [{name: token, projected: {sources: [{serviceAccountToken: {audience: copilot, path: token}}]}}]
`)

	// ops has all rights in both namespaces that can be given there, deployer is let
	// through, alice is a cluster admin.
	k.apply(`apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: everything}
rules: [{apiGroups: ["*"], resources: ["*"], verbs: ["*"]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: ops, namespace: pilot-system}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: everything}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: ops}, {apiGroup: rbac.authorization.k8s.io, kind: User, name: deployer}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: ops, namespace: copilot-system}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: everything}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: ops}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: pilot-administer}
rules: [{apiGroups: [apps], resources: [daemonsets], resourceNames: [pilot], verbs: [administer]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: pilot-administer}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: pilot-administer}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: deployer}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: alice}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: cluster-admin}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: alice}]
`)
	as := func(user, namespace, manifest string, args ...string) *exec.Cmd {
		args = append([]string{"--namespace", namespace, "--as", user}, args...)
		if strings.HasPrefix(user, "system:node:") {
			args = append([]string{"--as-group", "system:nodes", "--as-group", "system:authenticated"}, args...)
		}
		cmd := k.kubectl(args...)
		if manifest != "" {
			cmd.Stdin = strings.NewReader(manifest)
		}
		return cmd
	}
	const (
		podWithAccount = `{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "mine"}, "spec": {"serviceAccountName": "pilot", "containers": [{"name": "a", "image": "a"}]}}`
		plainPod       = `{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "mine"}, "spec": {"containers": [{"name": "a", "image": "a"}]}}`
		daemonSet      = `{"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "mine"}, "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"serviceAccountName": "pilot", "containers": [{"name": "a", "image": "a"}]}}}}`
		tokenSecret    = `{"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/service-account-token", "metadata": {"name": "mine", "annotations": {"kubernetes.io/service-account.name": "pilot"}}}`
		plainSecret    = `{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "mine"}}`
		privileged     = `{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "mine"}, "spec": {"containers": [{"name": "a", "image": "a", "securityContext": {"privileged": true}}]}}`
		ephemeral      = `{"spec": {"ephemeralContainers": [{"name": "a", "image": "a", "targetContainerName": "pilot"}]}}`
	)
	refused := []struct{ name, manifest, args string }{
		{"daemonsets", "", "patch daemonset pilot --patch {\"spec\":{\"template\":{\"spec\":{\"containers\":[{\"name\":\"pilot\",\"image\":\"mine\"}]}}}}"},
		{"daemonsets", "", "delete daemonset pilot"},
		{"daemonsets", daemonSet, "create -f -"},
		{"pods", podWithAccount, "create -f -"},
		{"pods", plainPod, "create -f -"},
		{"pods", "", "set image pod/on-worker-7 pilot=mine"},
		{"pods/ephemeralcontainers", "", "patch pod on-worker-7 --subresource ephemeralcontainers --patch " + strings.ReplaceAll(ephemeral, " ", "")},
		{"pods/exec", "", "exec on-worker-7 -- /usr/bin/pilot"},
		{"pods/attach", "", "attach on-worker-7"},
		{"configmaps", "", "create configmap pilot-other --from-literal broker=https://evil.example.com"},
		{"serviceaccounts/token", "", "create token pilot --audience copilot"},
		{"serviceaccounts/token", "", "create token pilot --audience copilot --bound-object-kind Pod --bound-object-name on-worker-7"},
		{"secrets", tokenSecret, "create -f -"},
	}
	const message = "pods of namespace pilot-system are root on all nodes: only cluster admins may "
	harness.Await(t, "the policy to be in force", func() error {
		out, err := as("ops", "pilot-system", "", "create", "token", "pilot").CombinedOutput()
		if err == nil || !strings.Contains(string(out), message) {
			return fmt.Errorf("%v: %s", err, out)
		}
		return nil
	})
	for _, c := range refused {
		cmd := as("ops", "pilot-system", c.manifest, strings.Fields(c.args)...)
		out := harness.CombinedOutput(t, cmd)
		if cmd.ProcessState.Success() || !strings.Contains(out, message) || !strings.Contains(out, " "+c.name+" here, and ops is none") {
			t.Errorf("%s: %s", c.args, out)
		}
	}
	succeeds := func(user, namespace, manifest, args string) {
		t.Helper()
		harness.Output(t, as(user, namespace, manifest, strings.Fields(args)...))
	}
	fails := func(user, namespace, manifest, args, want string) {
		t.Helper()
		harness.ExpectFailure(t, as(user, namespace, manifest, strings.Fields(args)...), want)
	}
	// What does no harm stays possible, and so does everything elsewhere.
	succeeds("ops", "pilot-system", "", "label pod on-worker-7 a=b")
	succeeds("ops", "pilot-system", "", "get daemonset pilot")
	succeeds("ops", "pilot-system", plainSecret, "create -f -")
	succeeds("ops", "copilot-system", "", "create token copilot")
	succeeds("ops", "copilot-system", "", "create configmap mine")
	// copilot's namespace has no privileged pods, and its tenants have no rights in pilot's.
	fails("ops", "copilot-system", privileged, "create -f -", "violates PodSecurity \"restricted:latest\"")
	harness.Output(t, k.kubectl("--namespace", "pilot-system", "delete", "rolebinding", "ops"))
	harness.Await(t, "ops to lose its rights", func() error {
		if as("ops", "pilot-system", "", "get", "daemonset", "pilot").Run() == nil {
			return fmt.Errorf("it still has them")
		}
		return nil
	})
	fails("ops", "pilot-system", podWithAccount, "create -f -", "cannot create resource")
	harness.Output(t, k.kubectl("--namespace", "pilot-system", "create", "rolebinding", "ops", "--clusterrole", "everything", "--user", "deployer"))
	harness.Await(t, "deployer's rights", func() error {
		return as("deployer", "pilot-system", "", "get", "daemonset", "pilot").Run()
	})

	for _, user := range []string{"alice", "deployer"} {
		succeeds(user, "pilot-system", "", "label daemonset pilot --overwrite by="+user)
		succeeds(user, "pilot-system", "", "create token pilot --audience copilot")
		succeeds(user, "pilot-system", podWithAccount, "create -f -")
		succeeds(user, "pilot-system", "", "delete pod mine --grace-period 0 --force")
	}
	// A kubelet gets tokens for the pods of its node, and for no others.
	succeeds("system:node:worker-7", "pilot-system", "", "create token pilot --audience copilot --bound-object-kind Pod --bound-object-name on-worker-7 --bound-object-uid "+
		harness.Output(t, k.kubectl("--namespace", "pilot-system", "get", "pod", "on-worker-7", "--output", "jsonpath={.metadata.uid}")))
	fails("system:node:worker-8", "pilot-system", "", "create token pilot --audience copilot --bound-object-kind Pod --bound-object-name on-worker-7 --bound-object-uid "+
		harness.Output(t, k.kubectl("--namespace", "pilot-system", "get", "pod", "on-worker-7", "--output", "jsonpath={.metadata.uid}")), "forbidden")

	// Kubernetes' controllers still do their work.
	succeeds("alice", "pilot-system", "", "delete daemonset pilot --cascade=foreground --timeout 2m --wait=false")
	harness.Output(t, k.kubectl("--namespace", "pilot-system", "delete", "pods", "--all", "--grace-period", "0", "--force"))
	harness.Output(t, k.kubectl("--namespace", "pilot-system", "wait", "daemonset/pilot", "--for", "delete", "--timeout", "3m"))
	harness.Output(t, k.kubectl("delete", "namespace", "pilot-system", "--timeout", "3m"))
}
