package faults

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

	"github.com/ctrlplane/pilot/integration/harness"
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
	for line := range strings.Lines(harness.Read(t, "/proc/self/mountinfo")) {
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
func (g *memoryGroup) add(t testing.TB, p *harness.Process) {
	t.Helper()
	if err := os.WriteFile(g.dir+"/cgroup.procs", fmt.Append(nil, p.Cmd.Process.Pid), 0); err != nil {
		t.Fatal(err)
	}
}

// kills returns how many of the group's processes the kernel has killed.
func (g *memoryGroup) kills(t testing.TB) int {
	t.Helper()
	_, rest, _ := strings.Cut("\n"+harness.Read(t, g.events), "\noom_kill ")
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
	harness.Long(t)
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	const limit, window, size = 96 << 20, 256 << 20, 200 << 20
	wide := harness.LayerKind{Name: "wide zstd", Compress: func(w io.Writer) io.WriteCloser {
		z, err := zstd.NewWriter(w, zstd.WithWindowSize(window), zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1))
		if err != nil {
			t.Fatal(err)
		}
		return z
	}, OCI: harness.LayerKinds[2].OCI, Docker: ""}
	zeros := map[string][]byte{"zeros": make([]byte, size)}
	images := map[string]string{}
	for name, k := range map[string]harness.LayerKind{"tar": harness.LayerKinds[0], "gzip": harness.LayerKinds[1], "zstd": harness.LayerKinds[2], "wide": wide} {
		images[name] = c.Registry + "/" + name + ":1"
		l := harness.NewLayout(t)
		layer, id := l.Layer(k, k.OCI, zeros)
		c.Publish(l, images[name], l.Manifest([]harness.Object{layer}, []string{id}), "provider:pilot:team-a")
	}

	home := harness.TempDir(t)
	g := newMemoryGroup(t, limit)
	started := func() *harness.Process {
		p := harness.StartActivatedPilot(t, home, c.BrokerURL)
		g.add(t, p)
		return p
	}
	p := started()
	n := harness.NewDifferNode(t, home, harness.DifferConfig{Containerd: harness.Containerd2()})
	pulls := func(name string) {
		t.Helper()
		harness.Output(t, n.Crictl("pull", images[name]))
		harness.Output(t, n.Crictl("rmi", images[name]))
		n.ExpectNoSnapshots(t)
	}
	for _, name := range []string{"tar", "gzip", "zstd"} {
		pulls(name)
	}
	if kills := g.kills(t); kills > 0 {
		t.Fatalf("pilot was killed %d times for layers that need little memory", kills)
	}
	harness.ExpectFailure(t, n.Crictl("pull", images["wide"]))
	select {
	case <-p.Done:
	case <-time.After(harness.Timeout):
		t.Fatal("pilot had the memory after all")
	}
	if s, ok := p.Cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || s.Signal() != syscall.SIGKILL || g.kills(t) == 0 {
		t.Fatalf("pilot ended, and was not killed for its memory: %s", p.Cmd.ProcessState)
	}
	// As systemd does, which holds its sockets.
	started()
	harness.Await(t, "the next pull", func() error { return n.Crictl("pull", images["tar"]).Run() })
	harness.Output(t, n.Crictl("rmi", images["tar"]))
	n.ExpectNoSnapshots(t)
	g.limit(t, 2*window)
	pulls("wide")
}
