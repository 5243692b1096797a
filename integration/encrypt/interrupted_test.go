package encrypt

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

const (
	// smallLayer is the size of a layer that has arrived before a run is interrupted, in
	// bytes, and largeLayer that of the others.
	smallLayer, largeLayer = 200 << 10, 12 << 20
	// slowly is how many bytes a second one request gets.
	slowly = 3 << 20
)

// unevenImage writes a layout with an image of a small layer and two large ones.
func unevenImage(t testing.TB, dir string) {
	t.Helper()
	l := harness.NewLayout(t)
	var layers [][]byte
	for _, size := range []int{largeLayer, smallLayer, largeLayer} {
		b := make([]byte, size)
		rand.Read(b)
		layers = append(layers, b)
	}
	l.Write(dir, "v1", l.ImageOf(harness.LayerKinds[0], layers))
}

// unfinished returns the files in a directory, and below, that are not whole.
func unfinished(t testing.TB, dir string) []string {
	t.Helper()
	var found []string
	for _, pattern := range []string{dir + "/.pilot-part-*", dir + "/*/.pilot-part-*"} {
		list, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, list...)
	}
	return found
}

// interrupt starts a command, and ends it by a signal once it has got far enough.
func interrupt(t testing.TB, cmd *exec.Cmd, sig syscall.Signal, farEnough func() error) {
	t.Helper()
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	harness.Await(t, "the command is in the middle of its work", func() error {
		select {
		case err := <-ended:
			t.Fatalf("%s ended: %v\n%s", strings.Join(cmd.Args, " "), err, out.String())
		default:
		}
		return farEnough()
	})
	cmd.Process.Signal(sig)
	if err := <-ended; err == nil {
		t.Errorf("%s: it exited with 0 after %v", strings.Join(cmd.Args, " "), sig)
	}
}

// TestInterruptedRunsLeaveNoTag ends runs in the middle of uploads and of writing files, by
// each signal, and runs them again: they go on from what is there.
func TestInterruptedRunsLeaveNoTag(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	dir := harness.TempDir(t)
	a := newAnywhere(t, dir, "team-a", "team-b")
	unevenImage(t, dir+"/plain")
	a.crypt("encrypt", "--json", "--recipient", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", "oci:"+dir+"/enc:x")
	registry, _ := harness.StartRegistry(t, dir)
	distribution, _ := harness.StartDistribution(t, dir)
	a.crypt("encrypt", "--json", "--recipient", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", "docker://"+registry+"/enc:x")

	for name, sig := range map[string]syscall.Signal{"SIGINT": syscall.SIGINT, "SIGTERM": syscall.SIGTERM, "SIGKILL": syscall.SIGKILL} {
		for kind, address := range map[string]string{"2.8": registry, "3": distribution} {
			t.Run(name+" while registry "+kind+" is written to", func(t *testing.T) {
				var finished, sending, forgotten atomic.Int64
				front := harness.FrontRegistry(t, address, func(h http.Handler) http.HandlerFunc {
					slow := harness.Throttled(slowly)(h)
					return func(w http.ResponseWriter, r *http.Request) {
						switch {
						case r.Method == http.MethodPatch:
							sending.Add(1)
							slow(w, r)
						case r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/blobs/"):
							slow(w, r)
							finished.Add(1)
						case r.Method == http.MethodDelete:
							forgotten.Add(1)
							h.ServeHTTP(w, r)
						default:
							h.ServeHTTP(w, r)
						}
					}
				})
				repository := strings.ToLower(name)
				to := func(address string) string { return "docker://" + address + "/" + repository + ":x" }
				args := []string{"rewrap", "--json", "--from", "team-a", "--to", "team-b", "oci:" + dir + "/enc:x"}
				interrupt(t, a.images(append(args, to(front))...), sig, func() error {
					if finished.Load() < 2 || sending.Load() == 0 {
						return fmt.Errorf("%d blobs are finished, and %d chunks on their way", finished.Load(), sending.Load())
					}
					return nil
				})
				harness.ExpectFailure(t, a.images("layerinfo", to(address)), "not found")
				if (forgotten.Load() > 0) != (sig != syscall.SIGKILL) {
					t.Errorf("the registry was to forget %d uploads", forgotten.Load())
				}
				again := a.rewrap(append(args[2:], to(address))...)[0]
				if again.Moved.Present < smallLayer || again.Moved.Copied < largeLayer {
					t.Errorf("it did not go on: %+v", again)
				}
				a.decrypts(to(address))
			})
		}
		t.Run(name+" while a directory and an archive are written", func(t *testing.T) {
			var reading atomic.Int64
			front := harness.FrontRegistry(t, registry, func(h http.Handler) http.HandlerFunc {
				slow := harness.Throttled(slowly)(h)
				return func(w http.ResponseWriter, r *http.Request) {
					if strings.Contains(r.URL.Path, "/blobs/") {
						reading.Add(1)
						slow(w, r)
						return
					}
					h.ServeHTTP(w, r)
				}
			})
			out := filepath.Join(dir, "out-"+name)
			if err := os.Mkdir(out, 0o755); err != nil {
				t.Fatal(err)
			}
			for _, to := range []string{"oci:" + out + "/layout:x", "oci-archive:" + out + "/app.tar:x"} {
				isLayout := strings.HasPrefix(to, "oci:")
				where := out
				if isLayout {
					where = out + "/layout"
				}
				args := []string{"rewrap", "--json", "--from", "team-a", "--to", "team-b", "docker://" + front + "/enc:x", to}
				interrupt(t, a.images(args...), sig, func() error {
					parts := unfinished(t, where)
					for _, p := range parts {
						if info, err := os.Stat(p); err == nil && info.Size() > 1<<20 {
							if whole, _ := filepath.Glob(where + "/blobs/sha256/*"); len(whole) > 1 || !isLayout {
								return nil
							}
						}
					}
					return fmt.Errorf("unfinished: %s", parts)
				})
				if left := unfinished(t, where); (len(left) > 0) != (sig == syscall.SIGKILL) {
					t.Errorf("%s: after %s, files are left: %s", to, name, left)
				}
				if _, err := a.images("layerinfo", to).Output(); err == nil {
					t.Errorf("%s is there", to)
				}
				// Another process may be at work in the same place.
				slowRun := a.images("rewrap", "--from", "team-a", "--to", "team-b", "docker://"+front+"/enc:x", strings.Replace(strings.Replace(to, ":x", ":y", 1), "app.tar", "other.tar", 1))
				var said strings.Builder
				slowRun.Stdout, slowRun.Stderr = &said, &said
				before := len(unfinished(t, where))
				if err := slowRun.Start(); err != nil {
					t.Fatal(err)
				}
				harness.Await(t, "another run writes", func() error {
					if now := len(unfinished(t, where)); now == 0 || before == 0 && now < 1 {
						return fmt.Errorf("%d unfinished files", now)
					}
					return nil
				})
				args[len(args)-2] = "docker://" + registry + "/enc:x"
				again := a.rewrap(args[2:]...)[0]
				if isLayout && again.Moved.Present < smallLayer {
					t.Errorf("%s: it did not go on: %+v", to, again)
				}
				a.decrypts(to)
				if err := slowRun.Wait(); err != nil {
					t.Errorf("%s: the other run: %v\n%s", to, err, said.String())
				}
				if left := unfinished(t, where); len(left) > 0 {
					t.Errorf("%s: files are left: %s", to, left)
				}
			}
		})
	}
}

// decrypts decrypts an image to see that it is whole.
func (a anywhere) decrypts(name string) {
	a.t.Helper()
	dir, err := os.MkdirTemp(a.dir, "decrypted-")
	if err != nil {
		a.t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if r := a.crypt("decrypt", "--json", name, "oci:"+dir+"/layout:x"); r.Layers == 0 {
		a.t.Errorf("%s: %+v", name, r)
	}
}

// TestFullDisksLeaveNothing encrypts into a layout, an archive and a registry's storage that
// have no room.
func TestFullDisksLeaveNothing(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	a := newAnywhere(t, dir, "team-a")
	unevenImage(t, dir+"/plain")
	l := harness.NewLayout(t)
	l.Write(dir+"/little", "v1", l.ImageOf(harness.LayerKinds[0], [][]byte{[]byte("a little")}))
	encrypt := func(args ...string) *exec.Cmd {
		return a.images(append([]string{"encrypt", "--recipient", "provider:pilot:team-a"}, args...)...)
	}
	full := dir + "/full"
	if err := os.Mkdir(full, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", full, "tmpfs", 0, "size=16m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(full, 0); err != nil {
			t.Error(err)
		}
	})
	for _, to := range []string{"oci:" + full + "/layout:x", "oci-archive:" + full + "/app.tar:x"} {
		harness.Output(t, encrypt("oci:"+dir+"/little:v1", to))
		before := harness.Output(t, a.images("layerinfo", to))
		for range 2 {
			harness.ExpectFailure(t, encrypt("--force", "oci:"+dir+"/plain:v1", to), "no space left on device")
		}
		if left := append(unfinished(t, full), unfinished(t, full+"/layout")...); len(left) > 0 {
			t.Errorf("%s: files are left: %s", to, left)
		}
		if now := harness.Output(t, a.images("layerinfo", to)); now != before {
			t.Errorf("%s is\n%s\nand was\n%s", to, now, before)
		}
		a.decrypts(to)
		os.RemoveAll(full + "/layout")
	}
	for _, start := range []func(testing.TB, string) (string, string){harness.StartRegistry, harness.StartDistribution} {
		var address string
		t.Run("registry", func(t *testing.T) {
			address, _ = start(t, full)
			to := "docker://" + address + "/app:x"
			out := harness.ExpectFailure(t, encrypt("oci:"+dir+"/plain:v1", to), "encrypt oci:"+dir+"/plain:v1: ")
			if !strings.Contains(out, "500") && !strings.Contains(out, "503") && !strings.Contains(out, "digest") {
				t.Errorf("the error does not say what the registry answered: %s", out)
			}
			harness.ExpectFailure(t, a.images("layerinfo", to), "not found")
		})
		os.RemoveAll(full + "/docker-registry")
	}
}

// TestTwoRunsAtOnce gives two images the same name at the same time.
func TestTwoRunsAtOnce(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	dir := harness.TempDir(t)
	a := newAnywhere(t, dir, "team-a")
	unevenImage(t, dir+"/plain")
	registry, _ := harness.StartRegistry(t, dir)
	if err := os.Mkdir(dir+"/archives", 0o755); err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{"oci:" + dir + "/to:x", "docker://" + registry + "/to:x", "oci-archive:" + dir + "/archives/to.tar:x"} {
		for _, force := range []bool{false, true} {
			ended := make(chan error, 4)
			var outputs [4]strings.Builder
			for i := range outputs {
				args := []string{"encrypt", "--recipient", "provider:pilot:team-a"}
				if force {
					args = append(args, "--force")
				}
				cmd := a.images(append(args, "oci:"+dir+"/plain:v1", to)...)
				cmd.Stdout, cmd.Stderr = &outputs[i], &outputs[i]
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				go func() { ended <- cmd.Wait() }()
			}
			succeeded := 0
			for range outputs {
				if err := <-ended; err == nil {
					succeeded++
				} else if !errors.As(err, new(*exec.ExitError)) {
					t.Error(err)
				}
			}
			for i := range outputs {
				out := outputs[i].String()
				if !strings.Contains(out, "layers encrypted") && !strings.Contains(out, "was changed while this command ran") && !strings.Contains(out, "already exists") {
					t.Errorf("%s: %s", to, out)
				}
			}
			// A registry can't compare and replace at once.
			if !force && (succeeded == 0 || succeeded > 1 && strings.HasPrefix(to, "oci:")) || force && succeeded != len(outputs) {
				t.Errorf("%s: %d of %d succeeded, force: %v", to, succeeded, len(outputs), force)
			}
			a.decrypts(to)
		}
		if left := append(unfinished(t, dir+"/to"), unfinished(t, dir+"/archives")...); len(left) > 0 {
			t.Errorf("%s: files are left: %s", to, left)
		}
	}
}

// TestKilledCopyIntoContainerdGoesOn kills a copy into containerd, which keeps what arrived,
// and copies again.
func TestKilledCopyIntoContainerdGoesOn(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	c := harness.StartCI(t, dir, "team-a", "team-b")
	unevenImage(t, dir+"/plain")
	plain := "docker://" + c.Registry + "/app:enc"
	harness.Output(t, c.CtrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", "oci:"+dir+"/plain:v1", plain))
	front := harness.FrontRegistry(t, c.Registry, harness.Throttled(slowly))
	interrupt(t, c.CtrPilot("images", "rewrap", "--from", "team-a", "--to", "team-b", "docker://"+front+"/app:enc", "app:1"), syscall.SIGKILL, func() error {
		ingests, err := filepath.Glob(c.Dir + "/root/io.containerd.content.v1.content/ingest/*/data")
		for _, f := range ingests {
			if info, err := os.Stat(f); err == nil && info.Size() > 1<<20 {
				return nil
			}
		}
		return fmt.Errorf("ingests: %s %v", ingests, err)
	})
	harness.ExpectFailure(t, c.CtrPilot("images", "layerinfo", "app:1"), "not found")
	harness.Output(t, c.CtrPilot("images", "rewrap", "--from", "team-a", "--to", "team-b", plain, "app:1"))
	harness.Output(t, c.CtrPilot("images", "decrypt", "app:1", "app:plain"))
}
