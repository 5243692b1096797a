package lazy

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

const mib = 1 << 20

// TestContainerRunsBeforeItsLayersArePulled runs a container of an encrypted image of which
// the registry has sent a small part, and reads a part of a large file.
func TestContainerRunsBeforeItsLayersArePulled(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	secret := harness.NewSecret()
	big, other := random(1, 24*mib), random(2, 24*mib)
	m.encrypt("app:1", layer{"hello": program(t), "secret": []byte(secret)}, layer{"big": big}, layer{"other": other})
	m.front.count()
	m.pull("app:1")
	if got := m.run("app:1"); got != "hello, "+secret+"\n" {
		t.Errorf("the container prints %q", got)
	}
	at := m.mount("app:1")
	part, err := readPart(at+"/big", 11*mib+1, 4096)
	if err != nil || !bytes.Equal(part, big[11*mib+1:][:4096]) {
		t.Errorf("a part of a large file is wrong: %v", err)
	}
	whole := int64(0)
	for _, l := range layersOf(m.manifest("app:1")) {
		whole += int64(l["size"].(float64))
	}
	fetched := m.front.count()
	// The first layer, which is small, and a chunk of 4 MiB.
	if fetched > whole/5 {
		t.Errorf("the registry has sent %d bytes, of %d", fetched, whole)
	}
	if reasons := m.fullPulls(); len(reasons) > 0 {
		t.Errorf("layers were pulled as a whole: %v", reasons)
	}
	var values map[string]float64
	harness.Await(t, "the metrics", func() error { // a range counts once it is sent
		values = m.metrics()
		if n := values[`pilot_lazy_bytes_total{from="registry"}`] + values[`pilot_lazy_verified_bytes_total`]; int64(n) > fetched || int64(n) < fetched-4096 { // the configuration is a blob too
			return fmt.Errorf("they say that %g bytes came from the registry, and it has sent %d", n, fetched)
		}
		return nil
	})
	if values["pilot_lazy_layers"] != 3 || values[`pilot_lazy_ranges_total{result="OK"}`] == 0 || values["pilot_lazy_toc_bytes"] == 0 {
		t.Errorf("metrics: %v layers, %v ranges, %v bytes of tails", values["pilot_lazy_layers"], values[`pilot_lazy_ranges_total{result="OK"}`], values["pilot_lazy_toc_bytes"])
	}
	if n := strings.Count(harness.Read(t, m.Pilot.Log), "layer served lazily"); n != 3 {
		t.Errorf("the log has %d lines of layers that are served lazily, not 3", n)
	}
	for name, want := range (layer{"big": big, "other": other}) {
		if got, err := os.ReadFile(filepath.Join(at, name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s, read whole, is wrong: %v", name, err)
		}
	}
	// Neither containerd nor the snapshotter keeps it decrypted in the content store.
	if harness.ContainsText(t, m.Dir+"/root/io.containerd.content.v1.content", secret) {
		t.Error("the content store has the secret")
	}

	// Its containers need the KEK, and so do those of an image that has plain layers under
	// its diff IDs.
	thief := clone(t, m.manifest("app:1"))
	for i := range layersOf(thief) {
		thief["layers"].([]any)[i] = m.pushBlob("app", "application/vnd.oci.image.layer.v1.tar", []byte{byte(i)})
	}
	m.push("app:thief", thief)
	m.pull("app:thief")
	client := harness.NewPilotClient(t, m.Dir)
	for name, why := range map[string]string{"app:1": "", "app:thief": "nothing shows that the image's own has the same content"} {
		harness.Await(t, name, func() error {
			answer := client.ImageKeys(t, "default", m.ref(name))
			if len(answer.Layers) != 3 {
				return fmt.Errorf("%+v", answer)
			}
			for _, l := range answer.Layers {
				if len(l.KEKs) != 1 || l.KEKs[0].ID != "team-a" || (why == "") != (l.Why == "") || !strings.Contains(l.Why, why) {
					return fmt.Errorf("%+v", l)
				}
			}
			return nil
		})
	}

	// The kubelet pulls by CRI.
	m.encrypt("pod:1", layer{"hello": program(t), "secret": []byte(harness.NewSecret())}, layer{"big": random(3, 24*mib)})
	m.front.count()
	harness.Output(t, m.Crictl("pull", m.ref("pod:1")))
	if fetched := m.front.count(); fetched > 4*mib {
		t.Errorf("for a pull by CRI the registry has sent %d bytes", fetched)
	}
}

// TestLayersOfOneBaseStayLazy has two images with the same layer, encrypted twice: they share
// its snapshot, and it is not read as a whole.
func TestLayersOfOneBaseStayLazy(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	base := layer{"hello": program(t), "big": random(4, 8*mib)}
	for _, name := range []string{"one:1", "two:1"} {
		m.encrypt(name, base, layer{"secret": []byte(name)})
		m.pull(name)
	}
	m.front.count()
	for _, name := range []string{"one:1", "two:1"} {
		if got := m.run(name); got != "hello, "+name+"\n" {
			t.Errorf("%s prints %q", name, got)
		}
	}
	if sent := m.front.count(); sent > 4*mib {
		t.Errorf("the registry has sent %d bytes", sent)
	}
	if n := m.metrics()[`pilot_lazy_layers_read_whole_total{result="OK"}`]; n != 0 {
		t.Errorf("%g layers were read as a whole", n)
	}
}

// TestLayersAreReadByHostsFiles pulls an image of a registry that can be reached by a hosts.toml
// alone.
func TestLayersAreReadByHostsFiles(t *testing.T) {
	t.Parallel()
	registry, storage := harness.StartRegistry(t, harness.TempDir(t))
	f := newFront(t, registry)
	hosts := harness.TempDir(t)
	harness.Write(t, hosts+"/registry.test/hosts.toml", "server = 'http://"+f.address+"'\n")
	m := &machine{harness.NewLazyNode(t, []string{f.address, "registry.test"}, "--mirror-hosts-dir", hosts), t, registry, storage, f, 0}
	secret := harness.NewSecret()
	m.encrypt("app:1", layer{"hello": program(t), "secret": []byte(secret)})
	const image = "registry.test/app:1"
	harness.Output(t, m.Ctr("images", "pull", "--hosts-dir", hosts, "--snapshotter", "pilot-lazy", image))
	if got := harness.ContainerOutput(t, m.Ctr("run", "--rm", "--snapshotter", "pilot-lazy", image, harness.ContainerID())); got != "hello, "+secret+"\n" {
		t.Errorf("the container prints %q", got)
	}
	if reasons := m.fullPulls(); len(reasons) > 0 {
		t.Errorf("layers were pulled as a whole: %v", reasons)
	}
}

// TestImageThatIsLazyInPartInTwoNamespaces pulls an image whose first layer is plain into two
// namespaces. Each unpacks that for itself, so they can't share what is mounted on it.
func TestImageThatIsLazyInPartInTwoNamespaces(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	secret := harness.NewSecret()
	m.encryptWith("app:1", []string{"--estargz", "--layer", "1", "--layer", "2"},
		layer{"hello": program(t)}, layer{"secret": []byte(secret)}, layer{"big": random(7, mib)})
	harness.Output(t, m.Crictl("pull", m.ref("app:1")))
	if n := m.metrics()["pilot_lazy_layers"]; n != 2 {
		t.Errorf("in the kubelet's namespace %g layers are lazy, not 2", n)
	}
	m.pull("app:1")
	if got := m.run("app:1"); got != "hello, "+secret+"\n" {
		t.Errorf("in the second namespace the container prints %q", got)
	}
	if n := strings.Count(harness.Read(t, m.Snapshotter.Log), "another namespace has it mounted"); n != 2 {
		t.Errorf("the log has %d layers that are pulled as a whole for that, not 2", n)
	}
}

// TestOtherLayersArePulledWhole pulls images that can't be lazy: they come in full, the log
// and the metrics say why, and other layers of the same image are lazy.
func TestOtherLayersArePulledWhole(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	secret := harness.NewSecret()
	files := []layer{{"hello": program(t)}, {"secret": []byte(secret)}, {"big": random(1, 2*mib)}}
	m.encryptWith("unsealed:1", nil, files...)
	m.pull("unsealed:1")
	if got := m.run("unsealed:1"); got != "hello, "+secret+"\n" {
		t.Errorf("the container prints %q", got)
	}
	if reasons := m.fullPulls(); reasons["not sealed"] != 3 || len(reasons) != 1 {
		t.Errorf("layers without a seal: %v", reasons)
	}
	// A plain image, of which no snapshot is there.
	m.remove("unsealed:1")
	l := harness.NewLayout(t)
	m.pushLayout("plain:1", l, l.Image(harness.LayerKinds[1], false, harness.Arch, secret))
	m.pull("plain:1")
	if got := m.run("plain:1"); got != "hello, "+secret+"\n" {
		t.Errorf("the container of the plain image prints %q", got)
	}
	if reasons := m.fullPulls(); reasons["plain"] != 2 {
		t.Errorf("plain layers: %v", reasons)
	}
	// Asked again, a layer is not logged and counted once more.
	m.remove("plain:1")
	m.pull("plain:1")
	if reasons := m.fullPulls(); reasons["plain"] != 2 {
		t.Errorf("plain layers, pulled again: %v", reasons)
	}
	log := harness.Read(t, m.Pilot.Log)
	for _, reason := range []string{`reason="not sealed"`, "reason=plain"} {
		if !strings.Contains(log, reason) || !strings.Contains(log, "it is pulled as a whole") {
			t.Errorf("the log does not have %s:\n%s", reason, log)
		}
	}

	// A snapshotter that has as much in memory as it may have.
	m.remove("plain:1")
	m.encrypt("sealed:1", files...)
	m.Snapshotter.Stop(t)
	m.StartSnapshotter("--max-memory", "1")
	harness.Await(t, "containerd connects to it again", func() error {
		return m.Ctr("snapshots", "--snapshotter", "pilot-lazy", "ls").Run()
	})
	m.front.count()
	m.pull("sealed:1")
	if fetched := m.front.count(); fetched < 2*mib {
		t.Errorf("the registry has sent %d bytes to a snapshotter without memory", fetched)
	}
	if got := m.run("sealed:1"); got != "hello, "+secret+"\n" {
		t.Errorf("pulled without memory, the container prints %q", got)
	}
	harness.Await(t, "the log says so", func() error {
		if log := harness.Read(t, m.Snapshotter.Log); !strings.Contains(log, "more than 1 MiB") {
			return errors.New(log)
		}
		return nil
	})
}
