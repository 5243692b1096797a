package lazy

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// reader reads a MiB of another chunk of a large file each time, which nothing has in memory.
type reader struct {
	file    string
	content []byte
	next    int
}

// step is how far one reads from the next: chunks have 4 MiB.
const step = 5 * mib

// read reads the next MiB, and returns an error if it can't be read, or is wrong.
func (r *reader) read() error {
	off := r.next * step
	r.next++
	if off >= len(r.content) {
		panic("the file is read to its end")
	}
	part, err := readPart(r.file, off, mib)
	if err == nil && !bytes.Equal(part, r.content[off:off+mib]) {
		return fmt.Errorf("wrong bytes at %d MiB", off/mib)
	}
	return err
}

// again reads the MiB that could not be read, until that succeeds.
func (r *reader) again(t testing.TB, what string) {
	t.Helper()
	harness.Await(t, what, func() error {
		r.next--
		return r.read()
	})
}

// TestReadsSurviveRestartsAndOutages mounts an image, and restarts or takes away what is
// needed to read it.
func TestReadsSurviveRestartsAndOutages(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	m := newMachine(t, "--kek-cache-ttl", "1s")
	secret := harness.NewSecret()
	content := random(5, 10*step)
	m.encrypt("app:1", layer{"hello": program(t), "secret": []byte(secret)}, layer{"big": content})
	m.pull("app:1")
	r := &reader{file: m.mount("app:1") + "/big", content: content}
	ok := func(what string) {
		t.Helper()
		if err := r.read(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	ok("all is well")

	m.Pilot.Stop(t)
	if err := r.read(); !errors.Is(err, syscall.EIO) {
		t.Errorf("while pilot is stopped: %v", err)
	}
	m.StartPilot("--kek-cache-ttl", "1s")
	r.again(t, "pilot is back")

	m.Process.Stop(t)
	ok("containerd is stopped")
	m.Pilot.Stop(t)
	m.StartPilot("--kek-cache-ttl", "1s")
	// Which images there are is not known, so nothing is served, and reads wait for that.
	path := m.lazyPath("app", layersOf(m.manifest("app:1"))[1]["digest"].(string))
	if got := m.ask(http.MethodGet, path, "100-200"); got.status != http.StatusServiceUnavailable {
		t.Errorf("while containerd is stopped, and pilot was restarted: %d %s", got.status, got.body)
	}
	// containerd waits for mounts, and does not get an answer that makes the snapshotter wait.
	if got := m.ask(http.MethodGet, path, "0-1"); got.status != http.StatusNotFound || got.header.Get("Retry-After") != "" {
		t.Errorf("a mount while containerd is stopped: %d %s, Retry-After %q", got.status, got.body, got.header.Get("Retry-After"))
	}
	waited := make(chan error, 1)
	go func() { waited <- r.read() }()
	m.Start(t)
	if err := <-waited; err != nil {
		t.Errorf("a read that began while containerd was stopped: %v", err)
	}
	if got := m.run("app:1"); got != "hello, "+secret+"\n" {
		t.Errorf("a container, once containerd is back: %q", got)
	}

	// The broker's KEKs are used for as long as kek-cache-grace says.
	ok("before the broker is stopped")
	m.Copilot.Kill()
	ok("the broker is away")
	m.Copilot, _ = harness.StartBroker(t, m.Dir+"/broker")

	m.front.set(func(w http.ResponseWriter, _ *http.Request, _ http.Handler) { panic(http.ErrAbortHandler) })
	if err := r.read(); !errors.Is(err, syscall.EIO) {
		t.Errorf("while the registry is gone: %v", err)
	}
	// What was read once is there, and a container starts.
	if got := m.run("app:1"); got != "hello, "+secret+"\n" {
		t.Errorf("a container, while the registry is gone: %q", got)
	}
	m.front.set(nil)
	r.again(t, "the registry is back")

	// The mounts of a snapshotter end with it. Containers that are started anew have all.
	m.Snapshotter.Stop(t)
	m.StartSnapshotter()
	harness.Await(t, "containerd connects to it again", func() error {
		return m.Ctr("snapshots", "--snapshotter", "pilot-lazy", "ls").Run()
	})
	if got := m.run("app:1"); got != "hello, "+secret+"\n" {
		t.Errorf("a container, once the snapshotter is back: %q", got)
	}
	if got, err := os.ReadFile(m.mount("app:1") + "/big"); err != nil || !bytes.Equal(got, content) {
		t.Errorf("once the snapshotter is back: %v", err)
	}
}

// TestReadsNeedRoomOnTheDisk fills the disk of the snapshotter, which keeps what it reads: reads
// of what it has not read before fail until there is room.
func TestReadsNeedRoomOnTheDisk(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.Snapshotter.Stop(t)
	disk := m.Dir + "/snapshotter"
	// The snapshotter's mounts are unmounted at the end, with this one.
	if err := syscall.Mount("tmpfs", disk, "tmpfs", 0, "size=64m"); err != nil {
		t.Fatal(err)
	}
	m.StartSnapshotter()
	harness.Await(t, "containerd connects to it again", func() error {
		return m.Ctr("snapshots", "--snapshotter", "pilot-lazy", "ls").Run()
	})
	content := random(5, 3*step)
	m.encrypt("app:1", layer{"big": content})
	m.pull("app:1")
	r := &reader{file: m.mount("app:1") + "/big", content: content}
	if err := r.read(); err != nil {
		t.Fatal(err)
	}
	harness.FillDisk(t, disk+"/filler")
	if err := r.read(); !errors.Is(err, syscall.EIO) {
		t.Errorf("a read, while the disk is full: %v", err)
	}
	if err := os.Remove(disk + "/filler"); err != nil {
		t.Fatal(err)
	}
	r.again(t, "there is room again")
}

// TestRevokedWhileMounted takes the KEK from the node: reads fail once the time of the cache
// is over, and go on when the node may use it again.
func TestRevokedWhileMounted(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "--kek-cache-ttl", "2s", "--kek-cache-grace", "1h")
	content := random(5, 3*step)
	m.encrypt("app:1", layer{"big": content})
	m.pull("app:1")
	r := &reader{file: m.mount("app:1") + "/big", content: content}
	if err := r.read(); err != nil {
		t.Fatal(err)
	}
	revoke := func(args ...string) {
		t.Helper()
		harness.Output(t, harness.Command(t, "copilot", append(append([]string{"keys", "revoke", "--dir", m.Dir + "/broker", "--identity", "uid:0"}, args...), "team-a")...))
	}
	revoke()
	path := m.lazyPath("app", layersOf(m.manifest("app:1"))[0]["digest"].(string))
	harness.Await(t, "the mirror refuses", func() error {
		if got := m.ask(http.MethodGet, path, "100-200"); got.status != http.StatusNotFound {
			return fmt.Errorf("%d", got.status)
		}
		return nil
	})
	if err := r.read(); !errors.Is(err, syscall.EIO) {
		t.Errorf("a read, once the KEK was revoked: %v", err)
	}
	log := harness.Read(t, m.Pilot.Log)
	if !strings.Contains(log, "read of a lazily pulled layer failed") || !strings.Contains(log, "not allowed") || !strings.Contains(log, "reason=denied") {
		t.Errorf("the log does not say so:\n%s", log)
	}
	if reasons := m.fullPulls(); len(reasons) > 0 {
		t.Errorf("reads count as pulls: %v", reasons)
	}
	// A new container does not start either, and says what to do.
	harness.ExpectFailure(t, m.Ctr("run", "--rm", "--snapshotter", "pilot-lazy", m.ref("app:1"), harness.ContainerID()), "pilot node doctor IMAGE")
	if log := harness.Read(t, m.Pilot.Log); !strings.Contains(log, "no container of it starts") || strings.Contains(log, "it is pulled as a whole") {
		t.Errorf("the log does not say that a container could not start:\n%s", log)
	}
	if reasons := m.fullPulls(); len(reasons) > 0 {
		t.Errorf("containers count as pulls: %v", reasons)
	}
	revoke("--undo")
	r.again(t, "the node may use the KEK again")
}
