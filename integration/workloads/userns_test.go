package workloads

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestLayerIsNotTakenForACopyForUsers has a pod with a user namespace, whose image has an
// encrypted layer on top of another image, where the snapshotter maps users, so that there is
// no copy.
func TestLayerIsNotTakenForACopyForUsers(t *testing.T) {
	t.Parallel()
	c := harness.StartCI(t, harness.TempDir(t), "team-a")
	l := harness.NewLayout(t)
	kind := harness.LayerKinds[1]
	hello, id := l.Layer(kind, kind.OCI, map[string][]byte{"hello": []byte(harness.Read(t, harness.Bin+"/hello"))})
	secret, secretID := l.Layer(kind, kind.OCI, map[string][]byte{"secret": []byte(harness.NewSecret())})
	base, app := c.Registry+"/base:1", c.Registry+"/app:1"
	for name, m := range map[string]harness.Object{
		base: l.Manifest([]harness.Object{hello}, []string{id}),
		app:  l.Manifest([]harness.Object{hello, secret}, []string{id, secretID}),
	} {
		harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", l.Tar(c.Dir+"/image.tar", name, m)))
		harness.Output(t, c.CtrPilot("images", "push", "--plain-http", name))
	}
	encrypted := c.Registry + "/encrypted:1"
	harness.Output(t, c.CtrPilot("images", "encrypt", "--plain-http", "--layer", "1", "--recipient", "provider:pilot:team-a", "docker://"+app, "docker://"+encrypted))
	v := harness.Containerd20()
	n := &node{harness.NewSharedNodeWith(t, harness.DifferConfig{Containerd: v, Sandbox: c.Pause(), More: network(t, v)}, "")}
	defer func() { harness.Output(t, n.Crictl("rmp", "-f", "-a")) }()
	n.letThrough(t)
	n.Allow(t, "a/*")
	harness.Output(t, n.Crictl("pull", base))
	harness.Output(t, n.Crictl("pull", encrypted))
	n.denied(t, n.mapped(t, "b", "1"), encrypted, `namespace "b" may not use KEK "team-a"`)
}

// TestPodsWithUserNamespaces has pods with hostUsers: false, on a node whose snapshotter can't
// map users, so that containerd copies the image for them, under a name of its own.
func TestPodsWithUserNamespaces(t *testing.T) {
	t.Parallel()
	c := harness.StartCI(t, harness.TempDir(t), "team-a")
	encrypted, pause := c.Image(harness.LayerKinds[1], "provider:pilot:team-a"), c.Pause()
	for _, v := range []harness.ContainerdVersion{harness.Containerd20(), harness.Containerd22(), harness.Containerd2()} {
		t.Run(v.Name, func(t *testing.T) {
			t.Parallel()
			n := &node{harness.NewSharedNodeWith(t, harness.DifferConfig{Containerd: v, Sandbox: pause, Snapshotter: "native", More: network(t, v)}, "workload-verdict-ttl = \"1s\"\n")}
			n.letThrough(t)
			defer func() { harness.Output(t, n.Crictl("rmp", "-f", "-a")) }()
			n.Allow(t, "a/*")
			harness.Output(t, n.Crictl("pull", encrypted))
			n.created(t, n.mapped(t, "a", "1"), encrypted)
			n.denied(t, n.mapped(t, "b", "2"), encrypted, `namespace "b" may not use KEK "team-a"`)
		})
	}
}

// letThrough lets the root of a pod, who is not ours, through to its files.
func (n *node) letThrough(t *testing.T) {
	t.Helper()
	for _, dir := range []string{"", "/state", "/state/io.containerd.runtime.v2.task", "/state/io.containerd.runtime.v2.task/k8s.io"} {
		if err := errors.Join(os.MkdirAll(n.Dir+dir, 0o711), os.Chmod(n.Dir+dir, 0o711)); err != nil {
			t.Fatal(err)
		}
	}
}

// network returns containerd's settings for a network of which pods have nothing: those with a
// user namespace can't have the machine's.
func network(t *testing.T, v harness.ContainerdVersion) string {
	t.Helper()
	dir := harness.TempDir(t)
	for _, name := range []string{"none", "loopback"} {
		program := harness.Write(t, dir+"/bin/"+name, `#!/bin/sh
case $CNI_COMMAND in
ADD) echo '{"cniVersion": "1.0.0", "interfaces": [{"name": "'$CNI_IFNAME'", "sandbox": "'$CNI_NETNS'"}], "ips": [{"address": "127.0.0.1/8", "interface": 0}]}' ;;
VERSION) echo '{"cniVersion": "1.0.0", "supportedVersions": ["0.3.1", "1.0.0"]}' ;;
esac
`)
		if err := os.Chmod(program, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	harness.Write(t, dir+"/net.d/none.conflist", `{"cniVersion": "1.0.0", "name": "none", "plugins": [{"type": "none"}]}`)
	bin := fmt.Sprintf("bin_dirs = ['%s/bin']", dir)
	if v.Name != harness.Containerd2().Name {
		bin = fmt.Sprintf("bin_dir = '%s/bin'", dir)
	}
	return fmt.Sprintf("[plugins.'io.containerd.cri.v1.runtime'.cni]\n  %s\n  conf_dir = '%s/net.d'\n", bin, dir)
}

// mapped makes a sandbox with a user namespace.
func (n *node) mapped(t *testing.T, namespace, uid string) pod {
	t.Helper()
	ids := []harness.Object{{"host_id": 100000, "container_id": 0, "length": 65536}}
	p := pod{uid: uid, namespaces: harness.Object{"pid": 1, "userns_options": harness.Object{"mode": 0, "uids": ids, "gids": ids}}}
	b, err := json.Marshal(harness.Object{
		"metadata": harness.Object{"name": "pod-" + uid, "namespace": namespace, "uid": uid, "attempt": 1}, "log_directory": filepath.Join(n.Dir, "logs", uid),
		"linux": harness.Object{"security_context": harness.Object{"namespace_options": p.namespaces}},
	})
	if err != nil {
		t.Fatal(err)
	}
	p.file = harness.Write(t, filepath.Join(n.Dir, "pods", uid+".json"), string(b))
	p.id = strings.TrimSpace(harness.Output(t, n.Crictl("runp", p.file)))
	return p
}
