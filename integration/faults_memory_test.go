package integration

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
)

// memoryGroup is a cgroup whose processes may have only so much memory.
type memoryGroup struct {
	dir    string
	max    string // the file with the limit
	events string // the file that counts those that were killed
}

// newMemoryGroup makes a cgroup, of version 2 or 1, whichever this machine
// limits memory with.
func newMemoryGroup(t testing.TB, limit int) *memoryGroup {
	t.Helper()
	for line := range strings.Lines(read(t, "/proc/self/mountinfo")) {
		mount, kind, _ := strings.Cut(line, " - ")
		where := strings.Fields(mount)[4]
		fields := strings.Fields(kind)
		g := &memoryGroup{dir: filepath.Join(where, fmt.Sprintf("pilot-it-%d", os.Getpid()))}
		switch {
		case fields[0] == "cgroup2":
			if controllers, err := os.ReadFile(where + "/cgroup.controllers"); err != nil || !strings.Contains(string(controllers), "memory") {
				continue
			}
			// systemd has done so, and then there is nothing to do.
			os.WriteFile(where+"/cgroup.subtree_control", []byte("+memory"), 0o644)
			g.max, g.events = g.dir+"/memory.max", g.dir+"/memory.events"
		case fields[0] == "cgroup" && strings.Contains(","+strings.TrimSpace(fields[2])+",", ",memory,"):
			g.max, g.events = g.dir+"/memory.limit_in_bytes", g.dir+"/memory.oom_control"
		default:
			continue
		}
		if err := os.Mkdir(g.dir, 0o755); err != nil {
			t.Fatalf("no cgroup can be made: %v: run this where cgroups are mounted for writing", err)
		}
		t.Cleanup(func() {
			if err := os.Remove(g.dir); err != nil {
				t.Error(err)
			}
		})
		g.limit(t, limit)
		for _, swap := range []string{"memory.swap.max", "memory.swappiness"} {
			// Only one is there, or none.
			f, err := os.OpenFile(filepath.Join(g.dir, swap), os.O_WRONLY, 0)
			if err != nil {
				continue
			}
			_, err = f.WriteString("0")
			if err := errors.Join(err, f.Close()); err != nil {
				t.Fatal(err)
			}
		}
		return g
	}
	t.Fatal("no cgroup can limit memory here: mount cgroup2 with the controller memory at /sys/fs/cgroup")
	return nil
}

// limit sets how many bytes the group's processes may have.
func (g *memoryGroup) limit(t testing.TB, bytes int) {
	t.Helper()
	if err := os.WriteFile(g.max, fmt.Append(nil, bytes), 0); err != nil {
		t.Fatalf("the cgroup takes no memory limit: %v: is the controller memory in cgroup.subtree_control of the group above?", err)
	}
}

// add puts a program into the group.
func (g *memoryGroup) add(t testing.TB, p *process) {
	t.Helper()
	if err := os.WriteFile(g.dir+"/cgroup.procs", fmt.Append(nil, p.cmd.Process.Pid), 0); err != nil {
		t.Fatal(err)
	}
}

// kills returns how many of the group's processes the kernel has killed.
func (g *memoryGroup) kills(t testing.TB) int {
	t.Helper()
	_, rest, _ := strings.Cut("\n"+read(t, g.events), "\noom_kill ")
	var n int
	if _, err := fmt.Sscan(rest, &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// TestOutOfMemory gives pilot little memory. Layers that are big or compressed
// a thousandfold need no more; one whose zstd window is larger has the kernel
// kill pilot, which takes that pull with it, and nothing else.
func TestOutOfMemory(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, brokerURL := broker(t, dir+"/broker", "team-a")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	c := newCI(t, dir+"/ci", ociConf)
	const limit, window, size = 96 << 20, 256 << 20, 200 << 20
	wide := kind{"zstd", func(w io.Writer) io.WriteCloser {
		z, err := zstd.NewWriter(w, zstd.WithWindowSize(window), zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1))
		if err != nil {
			t.Fatal(err)
		}
		return z
	}, kinds[2].oci, ""}
	zeros := map[string][]byte{"zeros": make([]byte, size)}
	images := map[string]string{}
	for name, k := range map[string]kind{"tar": kinds[0], "gzip": kinds[1], "zstd": kinds[2], "wide": wide} {
		images[name] = c.registry + "/" + name + ":1"
		l := newLayout(t)
		layer, id := l.layer(k, k.oci, zeros)
		c.publish(l, images[name], l.manifest([]object{layer}, []string{id}), "provider:pilot:team-a")
	}

	home := tempDir(t)
	g := newMemoryGroup(t, limit)
	started := func() *process {
		p := activated(t, home, brokerURL)
		g.add(t, p)
		return p
	}
	p := started()
	n := newDifferNode(t, home, differNode{v: containerd2()})
	pulls := func(name string) {
		t.Helper()
		output(t, n.crictl("pull", images[name]))
		output(t, n.crictl("rmi", images[name]))
		n.noSnapshots(t)
	}
	for _, name := range []string{"tar", "gzip", "zstd"} {
		pulls(name)
	}
	if kills := g.kills(t); kills > 0 {
		t.Fatalf("pilot was killed %d times for layers that need little memory", kills)
	}
	fails(t, n.crictl("pull", images["wide"]))
	select {
	case <-p.done:
	case <-time.After(patience):
		t.Fatal("pilot had the memory after all")
	}
	if s, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || s.Signal() != syscall.SIGKILL || g.kills(t) == 0 {
		t.Fatalf("pilot ended, and was not killed for its memory: %s", p.cmd.ProcessState)
	}
	// As systemd does, which holds its sockets.
	started()
	await(t, "the next pull", func() error { return n.crictl("pull", images["tar"]).Run() })
	output(t, n.crictl("rmi", images["tar"]))
	n.noSnapshots(t)
	g.limit(t, 2*window)
	pulls("wide")
}
