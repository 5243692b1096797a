package faults

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// leave fills a disk except for that many MiB, and returns what frees it again.
func leave(t *testing.T, dir string, free int) func() {
	t.Helper()
	reserved := filepath.Join(dir, "reserved")
	harness.Write(t, reserved, strings.Repeat("x", free<<20))
	harness.FillDisk(t, filepath.Join(dir, "filler"))
	remove := func(name string) {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	remove(reserved)
	return func() { remove(filepath.Join(dir, "filler")) }
}

// TestFullDiskOfNodeFailsCleanly fills the disks under containerd's content store and its
// snapshotter: what does not fit fails and says why, and leaves nothing but what
// was there before.
func TestFullDiskOfNodeFailsCleanly(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	dir := harness.TempDir(t)
	_, brokerURL := harness.StartBroker(t, dir+"/broker", "team-a")
	home := harness.TempDir(t)
	_, conf := harness.StartPilot(t, home, brokerURL, "--admin-listen", "unix://"+home+"/admin.sock")
	contents, snapshots := home+"/root/io.containerd.content.v1.content", home+"/root/io.containerd.snapshotter.v1.overlayfs"
	const layers, size, fits = 3, 16, 24 // MiB
	harness.MountDisk(t, contents, 256)
	harness.MountDisk(t, snapshots, 128)
	n := harness.NewDifferNode(t, home, harness.DifferConfig{Containerd: harness.Containerd2()})
	n.Ocicrypt = conf
	address, _ := harness.StartRegistry(t, dir)
	k := harness.NewPilotClient(t, home)

	plain, encrypted, decrypted := "example.com/big:1", address+"/big:1", "example.com/big:decrypted"
	l := harness.NewLayout(t)
	var blobs []harness.Object
	var ids []string
	for i := range layers {
		content := make([]byte, size<<20)
		for j := range content {
			content[j] = byte(i + j + j>>8 + j>>16)
		}
		layer, id := l.Layer(harness.LayerKinds[0], harness.LayerKinds[0].OCI, map[string][]byte{fmt.Sprintf("file%d", i): content})
		blobs, ids = append(blobs, layer), append(ids, id)
	}
	image := l.Tar(dir+"/image.tar", plain, l.Manifest(blobs, ids))
	harness.Output(t, n.CtrPilot("images", "import", "--no-unpack", image))
	original := n.Target(plain)
	encrypt := func() *exec.Cmd {
		return n.CtrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", plain, encrypted)
	}
	decrypt := func() *exec.Cmd { return n.CtrPilot("images", "decrypt", encrypted, decrypted) }
	// whole checks that these images are there, and nothing else.
	whole := func(what string, images ...string) {
		t.Helper()
		n.ExpectNothingPending()
		n.CollectGarbage(t)
		n.ExpectNoTraces(t)
		want := 0
		for _, image := range images {
			want += layers
			harness.Output(t, n.CtrPilot("images", "export", dir+"/export.tar", image)) // reads it all
		}
		if list := harness.Output(t, n.Ctr("content", "list")); strings.Count(list, fmt.Sprintf("\t%d.", size)) != want {
			t.Errorf("%s: want %d layers:\n%s", what, want, list)
		}
	}
	full := []string{"layer sha256:", "no space left on device"}

	goroutines, files := k.Metric(t, "go_goroutines"), k.Metric(t, "process_open_fds")
	free := leave(t, contents, fits)
	harness.ExpectFailure(t, encrypt(), full...)
	whole("encrypt", plain)
	free()
	harness.Output(t, encrypt())
	free = leave(t, contents, fits)
	harness.ExpectFailure(t, decrypt(), full...)
	whole("decrypt", plain, encrypted)
	free()
	harness.Output(t, decrypt())
	if got := n.Target(decrypted); got != original {
		t.Errorf("decrypted it is %s, and was %s", got, original)
	}
	whole("decrypted", plain, encrypted)

	harness.Output(t, n.CtrPilot("images", "push", "--plain-http", encrypted))
	harness.Output(t, n.CtrPilot("images", "remove", "--sync", plain, encrypted, decrypted))
	whole("removed")
	for _, where := range []struct {
		dir  string
		want []string
	}{{snapshots, append(full, "pilot: ")}, {contents, full[1:]}} {
		for client, pull := range map[string]func() *exec.Cmd{
			"crictl":      func() *exec.Cmd { return n.Crictl("pull", encrypted) },
			"ctr":         func() *exec.Cmd { return n.Ctr("images", "pull", "--plain-http", encrypted) },
			"ctr --local": func() *exec.Cmd { return n.Ctr("images", "pull", "--local", "--plain-http", encrypted) },
		} {
			what := client + " with a full " + filepath.Base(where.dir)
			free := leave(t, where.dir, fits)
			harness.ExpectFailure(t, pull(), where.want...)
			n.ExpectNoSnapshots(t)
			free()
			harness.Output(t, pull())
			if client == "crictl" {
				harness.Output(t, n.Crictl("rmi", encrypted))
			} else {
				harness.Output(t, n.Ctr("images", "remove", "--sync", encrypted))
			}
			n.ExpectNoSnapshots(t)
			whole(what)
			if leases := harness.Output(t, n.Ctr("--namespace", "k8s.io", "leases", "list", "-q")); leases != "" {
				t.Errorf("%s: leases are left: %s", what, leases)
			}
			if t.Failed() {
				return
			}
		}
	}
	k.CheckLeaks(t, "go_goroutines", goroutines)
	k.CheckLeaks(t, "process_open_fds", files)
}
