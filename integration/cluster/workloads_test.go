//go:build kubernetes

package cluster

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
)

// workloadRules allow two tenants of a node what they may use, by the labels of their pods.
const workloadRules = `
[[rule]]
identities = ["spiffe://example.com/node/node1"]
keks = ["team-a"]
actions = ["unwrap"]
workloads = ["prod/*"]
labels = "app in (web)"

[[rule]]
identities = ["spiffe://example.com/node/node1"]
keks = ["team-b"]
actions = ["unwrap"]
workloads = ["prod/*"]
`

// testWorkloads scales deployments on a node that asks the broker about each container,
// while a KEK is revoked, and while pilot is killed. teamA and teamB are encrypted images.
func testWorkloads(t *testing.T, k *kubernetes, b *harness.TLSBroker, teamA, teamB, plain string) {
	policy := b.Dir + "/policy.toml"
	harness.Write(t, policy, harness.Read(t, policy)+workloadRules)
	harness.Output(t, k.node.Run("pilot", "node", "install", "--workloads", "--now"))
	for _, namespace := range []string{"prod", "dev"} {
		harness.Output(t, k.kubectl("create", "namespace", namespace))
		harness.Await(t, "its service account", func() error { return k.kubectl("--namespace", namespace, "get", "serviceaccount", "default").Run() })
	}
	web, other, system := deployment{"prod", "web"}, deployment{"prod", "other"}, deployment{"dev", "plain"}
	unlabelled, stranger := deployment{"prod", "db"}, deployment{"dev", "web"}
	k.deploy(web, teamA)
	k.deploy(other, teamB)
	k.deploy(system, plain)
	for _, d := range []deployment{web, other, system} {
		k.rolledOutIn(d.namespace, "deployment/"+d.name)
	}
	// What may not start has its image unpacked on the node already.
	const denial = `may not use KEK "team-a"`
	for _, d := range []deployment{unlabelled, stranger} {
		k.deploy(d, teamA)
		k.denied(d, 1, `namespace "`+d.namespace+`" `+denial)
	}

	// Pods are being created while the KEK is revoked, and some of them may still start.
	k.scale(web, 4)
	harness.Output(t, b.Command(t, "keys", "revoke", "--identity", "spiffe://example.com/node/node1", "team-a"))
	time.Sleep(11 * time.Second) // after which no earlier verdict counts
	for _, d := range []deployment{web, other, system} {
		k.scale(d, 6)
	}
	k.rolledOutIn(other.namespace, "deployment/"+other.name)
	k.rolledOutIn(system.namespace, "deployment/"+system.name)
	k.denied(web, 2, `namespace "prod" `+denial)
	harness.Output(t, b.Command(t, "keys", "revoke", "--undo", "--identity", "spiffe://example.com/node/node1", "team-a"))
	k.rolledOutIn(web.namespace, "deployment/"+web.name)

	// pilot is killed again and again meanwhile.
	for _, d := range []deployment{web, other, system} {
		k.scale(d, 1)
	}
	for _, d := range []deployment{web, other, system, stranger} {
		k.scale(d, 5)
	}
	for range 6 {
		harness.Output(t, k.node.Run("systemctl", "kill", "--signal", "KILL", "pilot"))
		time.Sleep(time.Second)
	}
	for _, d := range []deployment{web, other, system} {
		k.rolledOutIn(d.namespace, "deployment/"+d.name)
	}
	k.denied(stranger, 5, denial)
	for _, d := range []deployment{unlabelled, stranger} {
		if started := k.containers(d, "{.state.running}{.state.terminated}{.lastState.terminated}"); strings.TrimSpace(started) != "" {
			t.Errorf("of %s, started: %s", d, started)
		}
	}
	for _, d := range []deployment{web, other, system, unlabelled, stranger} {
		harness.Output(t, k.kubectl("--namespace", d.namespace, "delete", "deployment", d.name, "--cascade=foreground", "--timeout", "4m"))
	}
	harness.Output(t, k.node.Run("pilot", "node", "install", "--workloads=false", "--now"))
}

// deployment is one that runs an image until it is removed.
type deployment struct{ namespace, name string }

func (k *kubernetes) deploy(d deployment, image string) {
	k.t.Helper()
	k.apply(fmt.Sprintf(`apiVersion: apps/v1
kind: Deployment
metadata: {name: %[2]s, namespace: %[1]s}
spec:
  progressDeadlineSeconds: 3600
  selector: {matchLabels: {app: %[2]s}}
  template:
    metadata: {labels: {app: %[2]s}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: app, image: '%[3]s', command: [/hello, pause]}]
`, d.namespace, d.name, image))
}

func (k *kubernetes) scale(d deployment, replicas int) {
	k.t.Helper()
	harness.Output(k.t, k.kubectl("--namespace", d.namespace, "scale", "deployment/"+d.name, fmt.Sprintf("--replicas=%d", replicas)))
}

// containers returns a part of the status of each container of a deployment, in lines.
func (k *kubernetes) containers(d deployment, part string) string {
	k.t.Helper()
	return harness.Output(k.t, k.kubectl("--namespace", d.namespace, "get", "pods", "--selector", "app="+d.name,
		"--output", `jsonpath={range .items[*].status.containerStatuses[*]}`+part+`{"\n"}{end}`))
}

// denied waits until at least so many containers of a deployment could not be created, and
// no others are on their way.
func (k *kubernetes) denied(d deployment, least int, why string) {
	k.t.Helper()
	harness.Await(k.t, fmt.Sprint(d, " to be denied"), func() error {
		states := k.containers(d, "{.state.waiting.reason} {.state.waiting.message}{.state.running.startedAt}")
		denied, others := 0, 0
		for _, line := range strings.Split(strings.TrimSpace(states), "\n") {
			switch {
			case strings.Contains(strings.ReplaceAll(line, `\"`, `"`), why):
				denied++
			case line == "" || strings.HasPrefix(line, "ContainerCreating") || strings.HasPrefix(line, "CreateContainerError"):
				others++
			}
		}
		if denied < least || others > 0 {
			return fmt.Errorf("%d are denied, %d undecided:\n%s", denied, others, states)
		}
		return nil
	})
}
