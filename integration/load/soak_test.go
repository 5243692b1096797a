//go:build soak

package load

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

	"github.com/ctrlplane/pilot/integration/harness"
	"golang.org/x/sync/errgroup"
)

// warmUp is until resources that are kept for a while, such as containerd's connections
// to a registry, have reached their number.
const warmUp = 2 * time.Minute

// TestSoak has a node pull, run and remove encrypted images for PILOT_SOAK, while
// layer keys are wrapped and unwrapped, the KEK is rotated, an image is rewrapped
// and all processes get SIGHUP. Their memory, descriptors and disk do not grow: the median of the second half is not above that of the
// second quarter.
func TestSoak(t *testing.T) {
	duration, err := time.ParseDuration(os.Getenv("PILOT_SOAK"))
	if err != nil || duration < time.Minute {
		t.Fatalf("PILOT_SOAK=%q: say how long, a minute or more, as in PILOT_SOAK=1h", os.Getenv("PILOT_SOAK"))
	}
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a")
	var images []string
	for _, k := range harness.LayerKinds {
		images = append(images, c.Image(k, "provider:pilot:team-a"))
	}
	home := harness.TempDir(t)
	provider, _ := harness.StartPilot(t, home, c.BrokerURL, "--admin-listen", "unix://"+home+"/admin.sock", "--kek-cache-ttl", "5s", "--log-level", "warning")
	n := harness.NewDifferNode(t, home, harness.DifferConfig{Containerd: harness.Containerd2()})
	provided, served := harness.NewPilotClient(t, home), harness.NewPilotClient(t, dir+"/broker")

	ctx, cancel := context.WithTimeout(t.Context(), warmUp+duration+time.Minute)
	defer cancel()
	run := func(name string, args ...string) error {
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Env = append(os.Environ(), "OCICRYPT_KEYPROVIDER_CONFIG="+c.Ocicrypt)
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
		annotation, err := provided.Wrap(ctx)
		if err == nil {
			err = provided.Unwrap(ctx, annotation)
		}
		wraps++
		return err
	}))
	g.Go(until(duration/30, func() error {
		return run("copilot", "keys", "rotate", "--dir", dir+"/broker", "team-a")
	}))
	g.Go(until(duration/60, func() error {
		for _, p := range []*harness.Process{provider, c.Broker} {
			if err := p.Cmd.Process.Signal(syscall.SIGHUP); err != nil {
				return err
			}
		}
		return run("ctr-pilot", "images", "rewrap", "--registry", "--plain-http", images[0])
	}))

	// Between two rounds nothing is under way on the node.
	series := map[string][]float64{}
	pulls, next := 0, start
	ctr := func(args ...string) error {
		return run(filepath.Join(harness.Tools, "bin/ctr"), append([]string{"--address", n.Socket, "--namespace", "soak"}, args...)...)
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
		for name, value := range resources(t, n, map[string]*harness.Process{"pilot": provider, "copilot": c.Broker, "containerd": n.Process}) {
			series[name] = append(series[name], value)
		}
		for name, k := range map[string]*harness.PilotClient{"pilot": provided, "copilot": served} {
			series[name+" goroutines"] = append(series[name+" goroutines"], k.Metric(t, "go_goroutines"))
			series[name+" heap MiB"] = append(series[name+" heap MiB"], k.Metric(t, "go_memstats_heap_inuse_bytes")/(1<<20))
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
		quarter, half := harness.Median(s[len(s)/4:len(s)/2]), harness.Median(s[len(s)/2:])
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
	harness.Output(t, harness.Command(t, "copilot", "audit", "verify", "--dir", dir+"/broker"))
}

// resources are what processes use of the machine, and the node of its disk.
func resources(t testing.TB, n *harness.Node, processes map[string]*harness.Process) map[string]float64 {
	t.Helper()
	taken := map[string]float64{}
	for name, p := range processes {
		proc := fmt.Sprintf("/proc/%d", p.Cmd.Process.Pid)
		_, rest, _ := strings.Cut(harness.Read(t, proc+"/status"), "VmRSS:")
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
			// and a half, so how many it has depends on how fast the pulls were.
			if to, err := os.Readlink(proc + "/fd/" + f.Name()); name != "containerd" || err == nil && !strings.HasPrefix(to, "socket:") {
				open++
			}
		}
		taken[name+" RSS MiB"], taken[name+" files"] = kib/1024, open
	}
	taken["mounts"] = float64(strings.Count(harness.Read(t, "/proc/self/mounts"), n.Dir))
	for name, below := range map[string]string{"blobs": "io.containerd.content.v1.content", "files in snapshots": "io.containerd.snapshotter.v1.overlayfs/snapshots"} {
		count := 0.
		err := filepath.WalkDir(filepath.Join(n.Dir, "root", below), func(_ string, e fs.DirEntry, err error) error {
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
