package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// disk mounts a disk of that many MiB at dir until the end of the test.
func disk(t testing.TB, dir string, size int) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%dm,mode=0755", size)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
}

// leave fills a disk but for that many MiB, and returns what frees it again.
func leave(t *testing.T, dir string, free int) func() {
	t.Helper()
	reserved := filepath.Join(dir, "reserved")
	write(t, reserved, strings.Repeat("x", free<<20))
	fill(t, filepath.Join(dir, "filler"))
	remove := func(name string) {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	remove(reserved)
	return func() { remove(filepath.Join(dir, "filler")) }
}

// TestFullNode fills the disks under containerd's content store and its
// snapshotter: what does not fit fails and says why, and leaves nothing but what
// was there before.
func TestFullNode(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	home := tempDir(t)
	_, conf := pilot(t, home, brokerURL, "--admin-listen", "unix://"+home+"/admin.sock")
	contents, snapshots := home+"/root/io.containerd.content.v1.content", home+"/root/io.containerd.snapshotter.v1.overlayfs"
	const layers, size, fits = 3, 16, 24 // MiB
	disk(t, contents, 256)
	disk(t, snapshots, 128)
	n := newDifferNode(t, home, differNode{v: containerd2()})
	n.ocicrypt = conf
	address, _ := registry(t, dir)
	k := askPilot(t, home)

	plain, encrypted, decrypted := "example.com/big:1", address+"/big:1", "example.com/big:decrypted"
	l := newLayout(t)
	var blobs []object
	var ids []string
	for i := range layers {
		content := make([]byte, size<<20)
		for j := range content {
			content[j] = byte(i + j + j>>8 + j>>16)
		}
		layer, id := l.layer(kinds[0], kinds[0].oci, map[string][]byte{fmt.Sprintf("file%d", i): content})
		blobs, ids = append(blobs, layer), append(ids, id)
	}
	image := l.tar(dir+"/image.tar", plain, l.manifest(blobs, ids))
	output(t, n.ctrPilot("images", "import", "--no-unpack", image))
	original := n.target(plain)
	encrypt := func() *exec.Cmd {
		return n.ctrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", plain, encrypted)
	}
	decrypt := func() *exec.Cmd { return n.ctrPilot("images", "decrypt", encrypted, decrypted) }
	// whole checks that these images are there, and nothing else.
	whole := func(what string, images ...string) {
		t.Helper()
		n.nothingPending()
		n.collect(t)
		n.noTraces(t)
		want := 0
		for _, image := range images {
			want += layers
			output(t, n.ctrPilot("images", "export", dir+"/export.tar", image)) // reads it all
		}
		if list := output(t, n.ctr("content", "list")); strings.Count(list, fmt.Sprintf("\t%d.", size)) != want {
			t.Errorf("%s: want %d layers:\n%s", what, want, list)
		}
	}
	full := []string{"layer sha256:", "no space left on device"}

	goroutines, files := k.metric(t, "go_goroutines"), k.metric(t, "process_open_fds")
	free := leave(t, contents, fits)
	fails(t, encrypt(), full...)
	whole("encrypt", plain)
	free()
	output(t, encrypt())
	free = leave(t, contents, fits)
	fails(t, decrypt(), full...)
	whole("decrypt", plain, encrypted)
	free()
	output(t, decrypt())
	if got := n.target(decrypted); got != original {
		t.Errorf("decrypted it is %s, and was %s", got, original)
	}
	whole("decrypted", plain, encrypted)

	output(t, n.ctrPilot("images", "push", "--plain-http", encrypted))
	output(t, n.ctrPilot("images", "remove", "--sync", plain, encrypted, decrypted))
	whole("removed")
	for _, where := range []struct {
		dir  string
		want []string
	}{{snapshots, append(full, "pilot: ")}, {contents, full[1:]}} {
		for client, pull := range map[string]func() *exec.Cmd{
			"crictl":      func() *exec.Cmd { return n.crictl("pull", encrypted) },
			"ctr":         func() *exec.Cmd { return n.ctr("images", "pull", "--plain-http", encrypted) },
			"ctr --local": func() *exec.Cmd { return n.ctr("images", "pull", "--local", "--plain-http", encrypted) },
		} {
			what := client + " with a full " + filepath.Base(where.dir)
			free := leave(t, where.dir, fits)
			fails(t, pull(), where.want...)
			n.noSnapshots(t)
			free()
			output(t, pull())
			if client == "crictl" {
				output(t, n.crictl("rmi", encrypted))
			} else {
				output(t, n.ctr("images", "remove", "--sync", encrypted))
			}
			n.noSnapshots(t)
			whole(what)
			if leases := output(t, n.ctr("--namespace", "k8s.io", "leases", "list", "-q")); leases != "" {
				t.Errorf("%s: leases are left: %s", what, leases)
			}
			if t.Failed() {
				return
			}
		}
	}
	k.flat(t, "go_goroutines", goroutines)
	k.flat(t, "process_open_fds", files)
}
