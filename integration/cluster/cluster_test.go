//go:build kubernetes

package cluster

import (
	"encoding/base64"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// kubernetes is a cluster of one node, a machine with systemd, containerd and a kubelet.
// The control plane runs beside it.
type kubernetes struct {
	t      testing.TB
	dir    string
	node   *harness.BootedMachine
	nspawn *harness.Process // that runs the node
}

// The addresses of the node and the API server, of services, and of pods.
const (
	nodeAddress    = "192.0.2.10"
	apiServer      = "https://" + nodeAddress + ":6443"
	serviceNetwork = "10.96.0.0/24"
	apiService     = "10.96.0.1"
	podNetwork     = "10.88.0.0/24"
)

// ownNetwork moves the test to a new network namespace: programs that it starts from now
// on can use any port, and a node's changes to the network affect nothing else.
func ownNetwork(t testing.TB) {
	t.Helper()
	runtime.LockOSThread() // for good: Go ends the thread with the test
	if err := syscall.Unshare(syscall.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	harness.Output(t, harness.Command(t, "ip", "link", "set", "lo", "up"))
	harness.Output(t, harness.Command(t, "ip", "address", "add", nodeAddress+"/32", "dev", "lo"))
	harness.Output(t, harness.Command(t, "ip", "route", "add", serviceNetwork, "dev", "lo")) // to where kube-proxy sees it
}

// NewAPIServer starts a cluster and waits until its node is ready.
func newKubernetes(t testing.TB, pause string) *kubernetes {
	t.Helper()
	for _, name := range []string{"kubernetes", "systemd-nspawn", "dnsmasq", "nft", "/usr/lib/cni/bridge"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Fatalf("%s is missing: install it with \"scripts/install-tools.sh %s kubernetes\"", name, harness.Tools)
		}
	}
	k := &kubernetes{t: t, dir: harness.TempDir(t)}
	harness.Write(t, k.dir+"/services/hosts", "")
	k.apiServer()
	k.controllers()
	k.bootNode(pause)
	k.kubelet()
	k.wait("node/node1", "condition=Ready")
	k.wait("serviceaccount/default", "create") // no pod can be made without
	return k
}

// program starts one of the cluster's programs.
func (k *kubernetes) program(name string, args ...string) {
	k.t.Helper()
	harness.Start(k.t, k.dir, name, exec.Command(filepath.Join(harness.Tools, "bin/kubernetes"), append([]string{name}, args...)...))
}

// apiServer starts etcd and the API server, and waits until that is ready.
func (k *kubernetes) apiServer() {
	t := k.t
	t.Helper()
	harness.Output(t, harness.Command(t, "openssl", "genrsa", "-out", k.dir+"/service-accounts.pem", "2048"))
	harness.Output(t, harness.Command(t, "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=kubernetes",
		"-addext", "subjectAltName=DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local,IP:"+nodeAddress+",IP:"+apiService,
		"-keyout", k.dir+"/key.pem", "-out", k.dir+"/ca.pem"))
	tokens := harness.Write(t, k.dir+"/tokens", "admin,admin,admin,system:masters\nnode,system:node:node1,node1,system:nodes\n")
	const etcd = "http://127.0.0.1:2379"
	k.program("etcd", "--data-dir", k.dir+"/etcd", "--unsafe-no-fsync", "--listen-client-urls", etcd, "--advertise-client-urls", etcd)
	k.program("kube-apiserver", "--etcd-servers", etcd, "--advertise-address", nodeAddress, "--service-cluster-ip-range", serviceNetwork,
		"--tls-cert-file", k.dir+"/ca.pem", "--tls-private-key-file", k.dir+"/key.pem",
		"--token-auth-file", tokens, "--authorization-mode", "Node,RBAC", "--enable-admission-plugins", "NodeRestriction", "--allow-privileged",
		"--service-account-issuer", "https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file", k.dir+"/service-accounts.pem", "--service-account-signing-key-file", k.dir+"/service-accounts.pem",
		"--kubelet-preferred-address-types", "InternalIP")
	k.kubeconfig("admin", k.dir+"/admin.conf")
	harness.Await(t, "the API server", func() error { return k.kubectl("get", "--raw", "/readyz").Run() })
}

func (k *kubernetes) controllers() {
	t := k.t
	t.Helper()
	k.program("kube-controller-manager", "--kubeconfig", k.dir+"/admin.conf", "--leader-elect=false", "--use-service-account-credentials",
		"--service-account-private-key-file", k.dir+"/service-accounts.pem", "--root-ca-file", k.dir+"/ca.pem")
	k.program("kube-scheduler", "--kubeconfig", k.dir+"/admin.conf", "--leader-elect=false")
	k.program("kube-proxy", "--kubeconfig", k.dir+"/admin.conf", "--hostname-override", "node1", "--proxy-mode", "nftables", "--cluster-cidr", podNetwork,
		"--conntrack-max-per-core", "0")
	harness.Start(t, k.dir, "dnsmasq", exec.Command("dnsmasq", "--keep-in-foreground", "--user=root", "--conf-file=/dev/null", "--pid-file",
		"--listen-address="+nodeAddress, "--bind-interfaces", "--no-resolv", "--no-hosts", "--hostsdir="+k.dir+"/services"))
	k.nameServices()
}

// nameServices lets pods resolve the names of the services that exist.
func (k *kubernetes) nameServices() {
	k.t.Helper()
	const addresses = `go-template={{range .items}}{{.spec.clusterIP}} {{.metadata.name}}.{{.metadata.namespace}}.svc.cluster.local{{"\n"}}{{end}}`
	const headless = `go-template={{range .items}}{{$meta := .metadata}}{{range .endpoints}}{{index .addresses 0}} {{index $meta.labels "kubernetes.io/service-name"}}.{{$meta.namespace}}.svc.cluster.local{{"\n"}}{{end}}{{end}}`
	harness.Write(k.t, k.dir+"/services/hosts", harness.Output(k.t, k.kubectl("get", "services", "--all-namespaces", "--field-selector", "spec.clusterIP!=None", "--output", addresses))+
		harness.Output(k.t, k.kubectl("get", "endpointslices", "--all-namespaces", "--selector", "service.kubernetes.io/headless", "--output", headless)))
}

// kubeconfig writes a kubeconfig with a token.
func (k *kubernetes) kubeconfig(token, file string) {
	k.t.Helper()
	harness.Write(k.t, file, fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: '%s', certificate-authority-data: %s}}]
users: [{name: test, user: {token: %s}}]
contexts: [{name: test, context: {cluster: test, user: test}}]
current-context: test
`, apiServer, base64.StdEncoding.EncodeToString([]byte(harness.Read(k.t, k.dir+"/ca.pem"))), token))
}

func (k *kubernetes) kubelet() {
	t := k.t
	t.Helper()
	k.kubeconfig("node", k.dir+"/kubelet/kubeconfig")
	// The kubelet sets no limits on pods, and leaves their cgroups to containerd.
	harness.Write(t, k.dir+"/kubelet/config.yaml", `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
failCgroupV1: false
failSwapOn: false
resolvConf: ""
# The machine's disk may be nearly full, and the node's is the same.
imageGCHighThresholdPercent: 100
evictionHard: {nodefs.available: "0%", nodefs.inodesFree: "0%", imagefs.available: "0%", imagefs.inodesFree: "0%"}
clusterDNS: ["`+nodeAddress+`"]
clusterDomain: cluster.local
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
`)
	harness.Output(t, k.node.Run("systemd-run", "--unit", "kubelet", "--property", "Restart=always",
		"kubernetes", "kubelet", "--config", "/var/lib/kubelet/config.yaml", "--kubeconfig", "/var/lib/kubelet/kubeconfig", "--hostname-override", "node1", "--node-ip", nodeAddress))
}

// kubectl returns a kubectl command of the cluster's admin.
func (k *kubernetes) kubectl(args ...string) *exec.Cmd {
	k.t.Helper()
	cmd := harness.Command(k.t, filepath.Join(harness.Tools, "bin/kubernetes"), append([]string{"kubectl", "--kubeconfig", k.dir + "/admin.conf", "--cache-dir", k.dir + "/cache"}, args...)...)
	return cmd
}

// apply applies a manifest.
func (k *kubernetes) apply(manifest string) {
	k.t.Helper()
	cmd := k.kubectl("apply", "-f", "-")
	cmd.Stdin = strings.NewReader(manifest)
	harness.Output(k.t, cmd)
}

// wait waits for a resource.
func (k *kubernetes) wait(resource, what string) {
	k.t.Helper()
	harness.Await(k.t, resource, func() error { return k.kubectl("get", resource).Run() })
	if out, err := k.kubectl("wait", resource, "--for", what, "--timeout", "4m").CombinedOutput(); err != nil {
		k.t.Fatalf("%s: %s\n%s\n%s\n%s", resource, out, harness.Output(k.t, k.kubectl("describe", resource)), harness.Output(k.t, k.kubectl("get", "events", "-A")), k.journal())
	}
}

// bootNode boots a machine with containerd in the test's network. Only basic units run.
func (k *kubernetes) bootNode(pause string) {
	t, dir := k.t, k.dir
	t.Helper()
	m := &harness.Machine{T: t, Root: dir + "/root", Lib: dir + "/lib"}
	for _, name := range []string{"upper", "work", "lib", "kubelet"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m.Mount("overlay", "", "overlay", 0, fmt.Sprintf("lowerdir=/,upperdir=%s/upper,workdir=%s/work", dir, dir))
	for _, name := range []string{"containerd", "containerd-shim-runc-v2", "ctr"} {
		m.AddProgram(filepath.Join(harness.Tools, "bin", name))
	}
	harness.Write(t, m.Root+"/etc/machine-id", "")
	harness.Write(t, m.Root+"/etc/systemd/system/containerd.service.d/version.conf", "[Service]\nExecStart=\nExecStart=/usr/local/bin/containerd\n")
	// A machine in a container may not lower OOM scores.
	harness.Write(t, m.Root+"/etc/containerd/config.toml", fmt.Sprintf(`version = 3
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ['/usr/lib/cni']
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = '%s'
`, pause))
	harness.Write(t, m.Root+"/etc/cni/net.d/bridge.conflist", fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "%s"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
`, podNetwork))

	k.node = &harness.BootedMachine{Machine: m}
	t.Cleanup(func() {
		harness.Output(t, exec.Command("find", "/sys/fs/cgroup", "-depth", "-type", "d", "-path", "*/"+filepath.Base(dir)+"*", "-exec", "rmdir", "{}", "+"))
	})
	k.up()
}

// journal returns the end of the node's journal.
func (k *kubernetes) journal() string {
	k.t.Helper()
	return harness.CombinedOutput(k.t, k.node.Run("journalctl", "--no-pager", "--lines=60", "--unit=containerd", "--unit=kubelet", "--unit=pilot"))
}

// reboot reboots the node, and calls a function before the kubelet is back.
func (k *kubernetes) reboot(meanwhile func()) {
	k.t.Helper()
	k.nspawn.Stop(k.t)
	k.up()
	meanwhile()
	k.kubelet()
}

// up boots the node and starts its containerd.
func (k *kubernetes) up() {
	t, b := k.t, k.node
	t.Helper()
	// In its own cgroup: systemd kills everything that it finds in it.
	k.nspawn = harness.Start(t, k.dir, "machine", exec.Command("sh", "-ec", `
		for hierarchy in unified systemd .; do
			[ -e /sys/fs/cgroup/$hierarchy/cgroup.procs ] || continue
			mkdir -p /sys/fs/cgroup/$hierarchy/$0 && echo $$ >/sys/fs/cgroup/$hierarchy/$0/cgroup.procs
		done
		exec systemd-nspawn "$@"`, filepath.Base(k.dir), "--quiet", "--directory", b.Root, "--machine", filepath.Base(k.dir), "--hostname", "node1", "--register=no", "--keep-unit",
		"--capability=all", "--system-call-filter=@keyring bpf", "--bind="+b.Lib+":/var/lib/containerd", "--bind="+k.dir+"/kubelet:/var/lib/kubelet",
		"--bind=/dev/kmsg", "--bind-ro="+filepath.Join(harness.Tools, "bin/kubernetes")+":/usr/local/bin/kubernetes",
		"--console=pipe", "--boot", "systemd.unit=basic.target"))
	harness.Await(t, "the machine's systemd", func() error {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", k.nspawn.Cmd.Process.Pid))
		if err != nil {
			return err
		}
		if _, err := fmt.Sscan(string(children), &b.Init); err != nil {
			return err
		}
		return b.Run("systemctl", "is-active", "basic.target").Run()
	})
	// nspawn mounts the controllers of cgroup v1 and the network's settings read-only, and
	// the kubelet needs settings that are not namespaced.
	harness.Output(t, b.Run("sh", "-ec", `
		mount --bind /proc/sys/net /proc/sys/net
		for mount in /sys/fs/cgroup/*/ /proc/sys/net; do mount -o remount,bind,rw $mount; done
		for setting in vm/overcommit_memory=1 kernel/panic=10 kernel/panic_on_oops=1; do
			file=$(mktemp) && echo ${setting#*=} >$file && mount --bind $file /proc/sys/${setting%=*}
		done`))
	harness.Output(t, b.Run("systemctl", "start", "containerd"))
}
