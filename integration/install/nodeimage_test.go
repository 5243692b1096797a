//go:build node

package install

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
	"golang.org/x/sys/unix"
)

// TestNodeImage boots the image that "make node-image" makes: with an identity
// that may use the KEK, then with one that may not, then with credentials that
// are no good. Each boot gets what to do by credentials too, so that nothing of
// the image is changed for the test.
func TestNodeImage(t *testing.T) {
	image := os.Getenv("PILOT_NODE_IMAGE")
	if image == "" {
		image = filepath.Join(harness.Repo, "dist/node-image/pilot-node.raw")
	}
	if _, err := os.Stat(image); err != nil {
		t.Fatalf("there is no image: make it with \"make node-image\": %v", err)
	}
	for _, name := range []string{"qemu-system-x86_64", "systemd-nspawn", "mkfs.ext4"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Fatalf("%v: install qemu-system-x86, ovmf, systemd-container and e2fsprogs", err)
		}
	}
	b := harness.NewTLSBroker(t, "team-a")
	// The names by which machines reach it, too.
	harness.Output(t, harness.Command(t, "copilot", "enroll", "--config-dir", b.Dir, "--out", b.Dir+"/new", "--host", "127.0.0.1", "--host", hostAddress, "server"))
	for _, name := range []string{"server-key.pem", "server.pem"} {
		if err := os.Rename(b.Dir+"/new/"+name, b.Dir+"/"+name); err != nil {
			t.Fatal(err)
		}
	}
	ca := b.Dir + "/ca.pem"
	ciCert, ciKey := b.Enroll(t, "builder", "--role", "ci")
	dir := harness.TempDir(t)
	_, ociConf := harness.StartPilot(t, dir, b.URL(), "--broker-ca", ca, "--broker-cert", ciCert, "--broker-key", ciKey)
	c := harness.NewCI(t, dir, ociConf)
	c.Pause()
	images := []string{c.Image(harness.LayerKinds[1], "provider:pilot:team-a"), c.Image(harness.LayerKinds[2], "provider:pilot:team-a")}

	_, port, _ := net.SplitHostPort(b.Address)
	credentials := func(cert, key string) map[string]string {
		return map[string]string{
			"pilot.broker": "https://" + net.JoinHostPort(hostAddress, port), "pilot.broker-ca": harness.Read(t, ca),
			"pilot.broker-cert": harness.Read(t, cert), "pilot.broker-key": harness.Read(t, key),
		}
	}
	allowed := credentials(b.Enroll(t, "worker-7"))
	denied := credentials(b.Enroll(t, "worker-8", "--role", "guest"))
	for name, boot := range map[string]func(*bootable, testing.TB){"qemu": (*bootable).qemu, "nspawn": (*bootable).nspawn} {
		t.Run(name, func(t *testing.T) {
			m := newBootable(t, image)
			m.forward(t, b.Address, c.Registry)
			up := func(image string, tries int, credentials map[string]string) *seen {
				m.provide(t, c.Registry, image, tries, credentials)
				begin := time.Now()
				boot(m, t)
				t.Logf("up and down in %s", time.Since(begin).Round(time.Second))
				return m.seen(t)
			}

			s := up(images[0], 60, allowed)
			s.ok("firstboot", "pilot asks https://"+hostAddress, "active")
			s.ok("doctor", "ok       broker", "ok       layer")
			s.ok("identity", "600 root")
			s.ok("pull")
			s.ok("run", c.Secrets[images[0]])
			if out := s.ok("failed"); strings.Contains(out, ".service") {
				t.Errorf("units that failed: %s", out)
			}
			if name == "qemu" {
				if _, size, _ := strings.Cut(s.ok("root"), "\n"); number(t, size) < diskSize>>20*8/10 {
					t.Errorf("the root has not grown: %s MiB", size)
				}
			}

			s = up(images[1], 1, denied)
			s.ok("firstboot", "active")
			s.fails("doctor", `KEK "team-a"`, "spiffe://example.com/guest/worker-8")
			s.fails("pull", "layer sha256:", `KEK "team-a"`, "spiffe://example.com/guest/worker-8")

			if name == "nspawn" {
				delete(denied, "pilot.broker-key")
				s = up(images[1], 1, denied)
				s.fails("firstboot", "there is a credential pilot.broker-cert and no pilot.broker-key", "failed")
			}
		})
	}
}

// hostAddress is the test's machine as those that it boots see it; qemu has
// it so.
const hostAddress = "10.0.2.2"

// diskSize is that of the machine's disk, which is larger than the image.
const diskSize = 2 << 30

// bootable is a machine with the image on its disk.
type bootable struct {
	dir         string
	disk        string
	files       string // a directory that the machine gets at
	credentials map[string]string
	netns       string
}

func newBootable(t testing.TB, image string) *bootable {
	t.Helper()
	dir := harness.TempDir(t)
	m := &bootable{dir: dir, disk: dir + "/disk.raw", files: dir + "/files"}
	harness.Output(t, harness.Command(t, "cp", "--sparse=always", image, m.disk))
	if err := os.Truncate(m.disk, diskSize); err != nil {
		t.Fatal(err)
	}
	harness.Output(t, harness.Command(t, "install", "-D", filepath.Join(harness.Tools, "bin/crictl"), m.files+"/crictl"))
	harness.Write(t, m.files+"/run.sh", harness.Read(t, filepath.Join(harness.Repo, "integration/testdata/node/run.sh")))
	return m
}

// provide has the next boot pull an image, with credentials.
func (m *bootable) provide(t testing.TB, registry, image string, tries int, credentials map[string]string) {
	t.Helper()
	harness.Write(t, m.files+"/settings", fmt.Sprintf("REGISTRY=%s\nIMAGE=%s\nTRIES=%d\n", registry, image, tries))
	host := harness.Object{"namespace_options": harness.Object{"network": 2, "pid": 1}}
	for name, o := range map[string]harness.Object{
		"pod.json": {"metadata": harness.Object{"name": "pod", "namespace": "test", "uid": "1", "attempt": 1}, "log_directory": "/run/pilot-test",
			"linux": harness.Object{"security_context": host, "cgroup_parent": "pods.slice"}},
		"container.json": {"metadata": harness.Object{"name": "app"}, "image": harness.Object{"image": image}, "log_path": "app.log", "linux": harness.Object{"security_context": host}},
	} {
		b, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		harness.Write(t, filepath.Join(m.files, name), string(b))
	}
	m.credentials = map[string]string{
		"systemd.extra-unit.pilot-test.service": `[Unit]
After=containerd.service pilot.service
SuccessAction=poweroff
FailureAction=poweroff

[Service]
Type=oneshot
ExecStart=/bin/sh -c 'to=/mnt/out; mountpoint -q /mnt || { to=/dev/ttyS1; mount -o ro /dev/disk/by-id/virtio-files /mnt; }; exec sh /mnt/run.sh >$to'
`,
		"systemd.unit-dropin.multi-user.target": "[Unit]\nWants=pilot-test.service\n",
	}
	for name, text := range credentials {
		m.credentials[name] = text
	}
	os.Remove(m.files + "/out")
}

// qemu boots the machine by its firmware and boot loader, until it is off.
func (m *bootable) qemu(t testing.TB) {
	t.Helper()
	const ovmf = "/usr/share/OVMF/OVMF_%s_4M.fd"
	files := m.dir + "/files.ext4"
	os.Remove(files)
	harness.Output(t, harness.Command(t, "mkfs.ext4", "-q", "-d", m.files, files, "128M"))
	harness.Write(t, m.dir+"/vars.fd", harness.Read(t, fmt.Sprintf(ovmf, "VARS")))
	args := []string{
		"-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1024", "-no-reboot", "-display", "none", "-monitor", "none",
		"-drive", "if=pflash,format=raw,readonly=on,file=" + fmt.Sprintf(ovmf, "CODE"),
		"-drive", "if=pflash,format=raw,file=" + m.dir + "/vars.fd",
		"-drive", "if=virtio,format=raw,file=" + m.disk,
		"-drive", "if=none,id=files,format=raw,readonly=on,file=" + files, "-device", "virtio-blk-pci,drive=files,serial=files",
		"-nic", "user,model=virtio-net-pci",
		"-serial", "file:" + m.dir + "/console.log", "-serial", "file:" + m.files + "/out",
	}
	for name, text := range m.credentials {
		file := harness.Write(t, filepath.Join(m.dir, name), "io.systemd.credential.binary:"+name+"="+base64.StdEncoding.EncodeToString([]byte(text)))
		args = append(args, "-smbios", "type=11,path="+file)
	}
	m.wait(t, exec.Command("qemu-system-x86_64", args...), 20*time.Minute)
}

// nspawn boots the image's root as a container, until it is off.
func (m *bootable) nspawn(t testing.TB) {
	t.Helper()
	root := m.dir + "/root"
	if err := os.MkdirAll(root, 0o755); err != nil {
		t.Fatal(err)
	}
	var table struct {
		PartitionTable struct {
			Partitions []struct {
				Start int64
				Name  string
			}
		}
	}
	if err := json.Unmarshal([]byte(harness.Output(t, harness.Command(t, "sfdisk", "--json", m.disk))), &table); err != nil {
		t.Fatal(err)
	}
	for _, p := range table.PartitionTable.Partitions {
		if p.Name == "root" {
			harness.Output(t, harness.Command(t, "mount", "-o", fmt.Sprintf("loop,offset=%d", p.Start*512), m.disk, root))
		}
	}
	defer func() { harness.Output(t, harness.Command(t, "umount", root)) }()
	// Its own network, always: it configures the interfaces that it sees.
	args := []string{"--boot", "--directory=" + root, "--machine=" + m.netns, "--network-namespace-path=/run/netns/" + m.netns,
		"--register=no", "--keep-unit", "--console=pipe",
		"--system-call-filter=@keyring bpf", // which runc needs
		"--bind=" + m.files + ":/mnt"}
	for name, text := range m.credentials {
		args = append(args, "--load-credential="+name+":"+harness.Write(t, filepath.Join(m.dir, name), text))
	}
	cmd := exec.Command("systemd-nspawn", args...)
	cmd.Env = append(os.Environ(), "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1")
	m.wait(t, cmd, 20*time.Minute)
}

// wait runs a machine until it is off.
func (m *bootable) wait(t testing.TB, cmd *exec.Cmd, within time.Duration) {
	t.Helper()
	p := harness.Start(t, m.dir, "machine", cmd)
	begin, wellAfter := time.Now(), time.Duration(0)
	for range time.Tick(200 * time.Millisecond) {
		select {
		case <-p.Done:
			t.Logf("doctor has ended after %s", wellAfter.Round(time.Second))
			return
		default:
		}
		if out, _ := os.ReadFile(m.files + "/out"); wellAfter == 0 && strings.Contains(string(out), "</doctor") {
			wellAfter = time.Since(begin)
		}
		if time.Since(begin) > within {
			p.Stop(t)
			console, _ := os.ReadFile(m.dir + "/console.log")
			out, _ := os.ReadFile(m.files + "/out")
			t.Fatalf("the machine is not off after %s\n%s\n%s", within, console[max(0, len(console)-8000):], out)
		}
	}
}

// forward lets the machine that is a container reach the host's servers at
// hostAddress, as qemu lets its own.
func (m *bootable) forward(t testing.TB, addresses ...string) {
	t.Helper()
	m.netns = filepath.Base(m.dir)
	harness.Output(t, harness.Command(t, "ip", "netns", "add", m.netns))
	t.Cleanup(func() { exec.Command("ip", "netns", "delete", m.netns).Run() })
	harness.Output(t, harness.Command(t, "ip", "-n", m.netns, "link", "set", "lo", "up"))
	harness.Output(t, harness.Command(t, "ip", "-n", m.netns, "address", "add", hostAddress+"/32", "dev", "lo"))
	for _, to := range addresses {
		_, port, _ := net.SplitHostPort(to)
		l, err := listenIn("/run/netns/"+m.netns, net.JoinHostPort(hostAddress, port))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				from, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer from.Close()
					server, err := net.Dial("tcp", to)
					if err != nil {
						return
					}
					defer server.Close()
					go io.Copy(server, from)
					io.Copy(from, server)
				}()
			}
		}()
	}
}

// listenIn listens in another network namespace.
func listenIn(namespace, address string) (l net.Listener, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // permanently: the thread ends with the goroutine
		var f *os.File
		if f, err = os.Open(namespace); err != nil {
			return
		}
		defer f.Close()
		if err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err == nil {
			l, err = net.Listen("tcp", address)
		}
	}()
	<-done
	return l, err
}

// seen is what the machine did.
type seen struct {
	t   testing.TB
	out string
}

func (m *bootable) seen(t testing.TB) *seen {
	t.Helper()
	out, err := os.ReadFile(m.files + "/out")
	if err != nil {
		t.Fatalf("the machine has not done anything: %v", err)
	}
	s := &seen{t, strings.ReplaceAll(strings.ReplaceAll(string(out), "\r", ""), `\"`, `"`)}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the machine says:\n%s", s.out)
		}
	})
	return s
}

// step returns what a step printed, and its exit status.
func (s *seen) step(name string, want []string) (string, int) {
	s.t.Helper()
	m := regexp.MustCompile(`(?s)<` + name + `>\n(.*)</` + name + ` (\d+)>`).FindStringSubmatch(s.out)
	if m == nil {
		s.t.Errorf("%s: the machine has not done it", name)
		return "", -1
	}
	for _, w := range want {
		if !strings.Contains(m[1], w) {
			s.t.Errorf("%s: want %q in\n%s", name, w, m[1])
		}
	}
	return m[1], number(s.t, m[2])
}

func (s *seen) ok(name string, want ...string) string {
	s.t.Helper()
	out, status := s.step(name, want)
	if status != 0 {
		s.t.Errorf("%s: exit status %d: %s", name, status, out)
	}
	return out
}

func (s *seen) fails(name string, want ...string) {
	s.t.Helper()
	if out, status := s.step(name, want); status == 0 {
		s.t.Errorf("%s succeeded: %s", name, out)
	}
}

func number(t testing.TB, text string) int {
	t.Helper()
	n, err := strconv.Atoi(strings.TrimSpace(text))
	if err != nil {
		t.Error(err)
	}
	return n
}
