//go:build soak

package integration

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

// warmUp is for what is kept for a while, as containerd's connections to a
// registry, to be as many as it will be.
const warmUp = 2 * time.Minute

// TestSoak has a node pull, run and remove encrypted images for PILOT_SOAK, while
// layer keys are wrapped and unwrapped, the KEK is rotated, an image is rewrapped
// and everybody is sent SIGHUP. What they take of memory, descriptors and the
// disk stays what it is: the median of the second half is not above that of the
// second quarter.
func TestSoak(t *testing.T) {
	duration, err := time.ParseDuration(os.Getenv("PILOT_SOAK"))
	if err != nil || duration < time.Minute {
		t.Fatalf("PILOT_SOAK=%q: say how long, a minute or more, as in PILOT_SOAK=1h", os.Getenv("PILOT_SOAK"))
	}
	dir := tempDir(t)
	brokerProcess, brokerURL := broker(t, dir+"/broker", "team-a")
	_, ociConf := pilot(t, dir+"/ci", brokerURL)
	c := newCI(t, dir+"/ci", ociConf)
	var images []string
	for _, k := range kinds {
		images = append(images, c.image(k, "provider:pilot:team-a"))
	}
	home := tempDir(t)
	provider, _ := pilot(t, home, brokerURL, "--admin-listen", "unix://"+home+"/admin.sock", "--kek-cache-ttl", "5s", "--log-level", "warning")
	n := newDifferNode(t, home, differNode{v: containerd2()})
	provided, served := askPilot(t, home), askPilot(t, dir+"/broker")

	ctx, cancel := context.WithTimeout(t.Context(), warmUp+duration+time.Minute)
	defer cancel()
	run := func(name string, args ...string) error {
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Env = append(os.Environ(), "OCICRYPT_KEYPROVIDER_CONFIG="+ociConf)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, out)
		}
		return nil
	}
	start := time.Now().Add(warmUp)
	stop := start.Add(duration)
	until := func(every time.Duration, do func() error) func() error {
		return func() error {
			for time.Now().Before(stop) {
				if err := do(); err != nil {
					return err
				}
				time.Sleep(every)
			}
			return nil
		}
	}
	var wraps int
	var g errgroup.Group
	g.Go(until(50*time.Millisecond, func() error {
		annotation, err := provided.wrap(ctx)
		if err == nil {
			err = provided.unwrap(ctx, annotation)
		}
		wraps++
		return err
	}))
	g.Go(until(duration/30, func() error {
		return run("copilot", "keys", "rotate", "--dir", dir+"/broker", "team-a")
	}))
	g.Go(until(duration/60, func() error {
		for _, p := range []*process{provider, brokerProcess} {
			if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
				return err
			}
		}
		return run("ctr-pilot", "images", "rewrap", "--registry", "--plain-http", images[0])
	}))

	// Between two rounds nothing is under way on the node.
	series := map[string][]float64{}
	pulls, next := 0, start
	ctr := func(args ...string) error {
		return run(filepath.Join(tools, "bin/ctr"), append([]string{"--address", n.socket, "--namespace", "soak"}, args...)...)
	}
	err = until(0, func() error {
		for _, image := range images {
			pulls++
			if err := ctr("images", "pull", "--plain-http", image); err != nil {
				return err
			}
			if err := ctr("run", "--rm", image, fmt.Sprintf("soak-%d-%d", os.Getpid(), pulls)); err != nil {
				return err
			}
			if err := ctr("images", "remove", "--sync", image); err != nil {
				return err
			}
		}
		if time.Now().Before(next) {
			return nil
		}
		next = next.Add(duration / 60)
		for name, value := range n.taken(t, map[string]*process{"pilot": provider, "copilot": brokerProcess, "containerd": n.process}) {
			series[name] = append(series[name], value)
		}
		for name, k := range map[string]*keys{"pilot": provided, "copilot": served} {
			series[name+" goroutines"] = append(series[name+" goroutines"], k.metric(t, "go_goroutines"))
			series[name+" heap MiB"] = append(series[name+" heap MiB"], k.metric(t, "go_memstats_heap_inuse_bytes")/(1<<20))
		}
		return nil
	})()
	if err != nil {
		t.Error(err)
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	t.Logf("%d pulls, %d keys wrapped and unwrapped", pulls, wraps)
	names := make([]string, 0, len(series))
	for name := range series {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		s := series[name]
		quarter, half := median(s[len(s)/4:len(s)/2]), median(s[len(s)/2:])
		var text []string
		for _, v := range s {
			text = append(text, strconv.FormatFloat(v, 'f', 0, 64))
		}
		t.Logf("%s: %.1f in the second quarter, %.1f in the second half: %s", name, quarter, half, strings.Join(text, " "))
		if half > quarter*1.1+4 {
			t.Errorf("%s grows", name)
		}
	}
	if len(series["pilot RSS MiB"]) < 20 {
		t.Errorf("there are %d samples only", len(series["pilot RSS MiB"]))
	}
	output(t, command(t, "copilot", "audit", "verify", "--dir", dir+"/broker"))
}

// taken tells what processes take of the machine, and the node of its disk.
func (n *node) taken(t testing.TB, processes map[string]*process) map[string]float64 {
	t.Helper()
	taken := map[string]float64{}
	for name, p := range processes {
		proc := fmt.Sprintf("/proc/%d", p.cmd.Process.Pid)
		_, rest, _ := strings.Cut(read(t, proc+"/status"), "VmRSS:")
		var kib float64
		if _, err := fmt.Sscan(rest, &kib); err != nil {
			t.Fatal(err)
		}
		files, err := os.ReadDir(proc + "/fd")
		if err != nil {
			t.Fatal(err)
		}
		open := 0.
		for _, f := range files {
			// containerd keeps each pull's connection to the registry for a minute
			// and a half, so how many it has tells how fast the pulls were.
			if to, err := os.Readlink(proc + "/fd/" + f.Name()); name != "containerd" || err == nil && !strings.HasPrefix(to, "socket:") {
				open++
			}
		}
		taken[name+" RSS MiB"], taken[name+" files"] = kib/1024, open
	}
	taken["mounts"] = float64(strings.Count(read(t, "/proc/self/mounts"), n.dir))
	for name, below := range map[string]string{"blobs": "io.containerd.content.v1.content", "files in snapshots": "io.containerd.snapshotter.v1.overlayfs/snapshots"} {
		count := 0.
		err := filepath.WalkDir(filepath.Join(n.dir, "root", below), func(_ string, e fs.DirEntry, err error) error {
			if err == nil && !e.IsDir() {
				count++
			}
			return nil // it may be collected meanwhile
		})
		if err != nil {
			t.Fatal(err)
		}
		taken[name] = count
	}
	return taken
}
