package load

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestManyPullsAtOnce pulls many different encrypted images at the same time, each by
// a crictl of its own: 16, or as many as PILOT_PULLS says, of all kinds of layers, with one to four of those, under
// three KEKs.
func TestManyPullsAtOnce(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	count := 16
	if s := os.Getenv("PILOT_PULLS"); s != "" {
		var err error
		if count, err = strconv.Atoi(s); err != nil {
			t.Fatalf("PILOT_PULLS: %v", err)
		}
	}
	dir := harness.TempDir(t)
	keks := []string{"team-a", "team-b", "team-c"}
	c := harness.StartCI(t, dir, keks...)
	var images []string
	for i := range count {
		images = append(images, layeredImage(c, i, 1+i%4, "provider:pilot:"+keks[i%len(keks)]))
	}

	home := harness.TempDir(t)
	provider, _ := harness.StartPilot(t, home, c.BrokerURL, "--admin-listen", "unix://"+home+"/admin.sock")
	n := harness.NewDifferNode(t, home, harness.DifferConfig{Containerd: harness.Containerd2(), Unpacks: 8})
	// What pilot keeps as long as it runs is there after the first pull.
	first := layeredImage(c, count, 1, "provider:pilot:team-a")
	harness.Output(t, n.Crictl("pull", first))
	harness.Output(t, n.Crictl("rmi", first))
	asked := exports(t, dir+"/broker")
	k := harness.NewPilotClient(t, home)
	goroutines, files := k.Metric(t, "go_goroutines"), k.Metric(t, "process_open_fds")

	begin := time.Now()
	var wg sync.WaitGroup
	for _, image := range images {
		pull := n.Crictl("pull", image)
		wg.Go(func() {
			if out, err := pull.CombinedOutput(); err != nil {
				t.Errorf("%s: %v: %s", image, err, out)
			}
		})
	}
	wg.Wait()
	t.Logf("%d pulls took %s, pilot %d MiB", count, time.Since(begin).Round(10*time.Millisecond), provider.Peak(t)>>20)
	if t.Failed() {
		return
	}

	// Each layer is a snapshot, and whole.
	found := map[string]bool{}
	paths, err := filepath.Glob(home + "/root/io.containerd.snapshotter.v1.overlayfs/snapshots/*/fs/file*")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		found[filepath.Base(path)+harness.Read(t, path)] = true
	}
	layers := 0
	for i, image := range images {
		for layer := range 1 + i%4 {
			layers++
			if !found[fmt.Sprintf("file%d", layer)+layerContent(c, image, layer)] {
				t.Errorf("%s: layer %d is not in its snapshots", image, layer)
			}
		}
	}
	if len(paths) != layers {
		t.Errorf("there are %d snapshots with a file, not %d", len(paths), layers)
	}
	// team-a was in memory.
	now := exports(t, dir+"/broker")
	for _, kek := range keks[1:] {
		if now[kek]-asked[kek] != 1 {
			t.Errorf("the broker was asked for %s %d times", kek, now[kek]-asked[kek])
		}
	}
	if now["team-a"] != asked["team-a"] {
		t.Errorf("the broker was asked again for team-a")
	}
	if peak := provider.Peak(t); peak > 160<<20 {
		t.Errorf("pilot took %d MiB", peak>>20)
	}
	for _, image := range images {
		harness.Output(t, n.Crictl("rmi", image))
	}
	k.CheckLeaks(t, "go_goroutines", goroutines)
	k.CheckLeaks(t, "process_open_fds", files)
	n.ExpectNoSnapshots(t)
}

// layeredImage makes an encrypted image of some layers, each with a unique file.
func layeredImage(c *harness.CI, i, layers int, recipient string) string {
	c.T.Helper()
	k := harness.LayerKinds[i%len(harness.LayerKinds)]
	name := fmt.Sprintf("%s/layered%d:1", c.Registry, i)
	c.Secrets[name] = harness.NewSecret()
	l := harness.NewLayout(c.T)
	var blobs []harness.Object
	var ids []string
	for j := range layers {
		blob, id := l.Layer(k, k.OCI, map[string][]byte{fmt.Sprintf("file%d", j): []byte(layerContent(c, name, j))})
		blobs, ids = append(blobs, blob), append(ids, id)
	}
	c.Publish(l, name, l.Manifest(blobs, ids), recipient)
	return name
}

// layerContent returns what is in a layer of such an image: some 200 KB.
func layerContent(c *harness.CI, image string, layer int) string {
	return strings.Repeat(fmt.Sprintf("%s, layer %d\n", c.Secrets[image], layer), 4000)
}

// exports returns how often each KEK was exported to unwrap with.
func exports(t testing.TB, dir string) map[string]int {
	t.Helper()
	counts := map[string]int{}
	for line := range strings.Lines(harness.Read(t, filepath.Join(dir, "audit.log"))) {
		var e struct{ Action, KEK string }
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatal(err)
		}
		if e.Action == "export" {
			counts[e.KEK]++
		}
	}
	return counts
}
