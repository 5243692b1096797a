package broker

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
)

// stored is a copilot with KEKs, in a file or a database.
type stored struct {
	t       *testing.T
	dir     string
	log     string // directory of its log, if that is another one
	flags   []string
	process *harness.Process
}

func (s *stored) start() {
	s.t.Helper()
	s.process = harness.Start(s.t, cmp.Or(s.log, s.dir), "copilot", exec.Command("copilot", append([]string{"serve", "--dir", s.dir, "--listen", "unix://" + s.dir + "/copilot.sock"}, s.flags...)...))
	harness.Await(s.t, "copilot", harness.Reachable(s.dir+"/copilot.sock"))
}

func (s *stored) command(args ...string) *exec.Cmd {
	s.t.Helper()
	return harness.Command(s.t, "copilot", append(append(args[:2:2], "--dir", s.dir), append(s.flags, args[2:]...)...)...)
}

func (s *stored) request(method, path, body string) (int, string) {
	s.t.Helper()
	return harness.RequestOverSocket(s.t, s.dir+"/admin.sock", method, path, body)
}

// create creates n KEKs, and returns their keys.
func (s *stored) create(n int) map[string]string {
	s.t.Helper()
	keys := make(map[string]string)
	for i := range n {
		id := fmt.Sprintf("kek-%d", i)
		if status, body := s.request("POST", "/api/v2/keks", `{"id":"`+id+`"}`); status != 200 {
			s.t.Fatalf("create: %d %s", status, body)
		}
		keys[id] = s.key(id)
	}
	return keys
}

func (s *stored) key(id string) string {
	s.t.Helper()
	status, body := s.request("GET", "/api/v2/keks/"+id+"/key?version=1", "")
	if status != 200 {
		s.t.Errorf("%s: %d %s", id, status, body)
	}
	return body
}

func (s *stored) has(keys map[string]string) {
	s.t.Helper()
	for id, key := range keys {
		if got := s.key(id); got != key {
			s.t.Fatalf("%s has another key", id)
		}
	}
}

type masterStatus struct {
	Current            int
	Rotating, Resealed bool
	Waiting, Damaged   []string
	Keys               []struct{ Version, Records int }
}

func (s *stored) status() (m masterStatus) {
	s.t.Helper()
	if err := json.Unmarshal([]byte(harness.Output(s.t, s.command("master", "status", "--json"))), &m); err != nil {
		s.t.Fatal(err)
	}
	return m
}

// rotated waits until a rotation is done, and checks that one master key seals n KEKs.
func (s *stored) rotated(version, n int) {
	s.t.Helper()
	harness.Await(s.t, "the rotation is done", func() error {
		if m := s.status(); m.Rotating || m.Current != version {
			return fmt.Errorf("%+v\n%s", m, harness.Read(s.t, s.process.Log))
		}
		return nil
	})
	if m := s.status(); len(m.Keys) != 1 || m.Keys[0].Records != n || len(m.Damaged) > 0 {
		s.t.Errorf("%+v", m)
	}
}

// TestRotatedMasterKeyOutlivesKills kills copilot again and again while it rotates the
// master key. It goes on each time, and every KEK stays as it is.
func TestRotatedMasterKeyOutlivesKills(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	const n, rotations = 300, 6
	s := &stored{t: t, dir: harness.TempDir(t)}
	s.start()
	keys := s.create(n)
	first := harness.Read(t, s.dir+"/master.key")
	for version := 2; version < 2+rotations; version++ {
		if status, body := s.request("POST", "/master/rotate", ""); status != 200 {
			t.Fatalf("%d %s", status, body)
		}
		for range 3 {
			time.Sleep(rand.N(60 * time.Millisecond))
			s.process.Kill()
			s.start()
		}
		s.rotated(version, n)
	}
	s.has(keys)

	// A kill of the command line, which rotates a store that nobody serves.
	s.process.Stop(t)
	for range 3 {
		cmd := s.command("master", "rotate")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(rand.N(300 * time.Millisecond))
		cmd.Process.Kill()
		cmd.Wait()
	}
	harness.Output(t, s.command("master", "rotate"))
	s.start()
	s.has(keys)
	if out := harness.Output(t, s.command("audit", "verify")); !strings.Contains(out, "none changed or missing") {
		t.Error(out)
	}
	// With the log and the key alone, too, as an auditor has them.
	copied := harness.TempDir(t)
	harness.Write(t, copied+"/master.key", harness.Read(t, s.dir+"/master.key"))
	harness.Output(t, harness.Command(t, "copilot", "audit", "verify", "--dir", copied, s.dir+"/audit.log"))

	// The first master key opens nothing any more, and nothing looks as if it did.
	s.process.Stop(t)
	last := harness.Read(t, s.dir+"/master.key")
	harness.Write(t, s.dir+"/master.key", first)
	harness.ExpectFailure(t, s.command("keys", "list"), "the master key is not the one that the KEKs are sealed with", "is current")
	harness.Write(t, s.dir+"/master.key", last)
	harness.Output(t, s.command("keys", "list"))
}

// TestFullDiskKeepsBothMasterKeys rotates on a disk that is full.
func TestFullDiskKeepsBothMasterKeys(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	dir := harness.TempDir(t) + "/store"
	harness.MountDisk(t, dir, 8)
	elsewhere := harness.TempDir(t)
	s := &stored{t: t, dir: dir, log: elsewhere, flags: []string{"--audit-log", elsewhere + "/audit.log"}}
	s.start()
	const n = 1000
	keys := s.create(n)
	// The records get longer, and the file larger than it is.
	harness.FillDisk(t, dir+"/filler")
	status, body := s.request("POST", "/master/rotate", "")
	if status == 200 {
		harness.Await(t, "it says that the disk is full", func() error {
			if s.process.Logged(t, "no space left on device") == 0 {
				return fmt.Errorf("%s", harness.Read(t, s.process.Log))
			}
			return nil
		})
	} else if !strings.Contains(body, "no space left on device") && !strings.Contains(body, "audit") {
		t.Errorf("%d %s", status, body)
	}
	if err := os.Remove(dir + "/filler"); err != nil {
		t.Fatal(err)
	}
	s.has(keys)
	if status != 200 {
		if status, body := s.request("POST", "/master/rotate", ""); status != 200 {
			t.Fatalf("%d %s", status, body)
		}
	}
	s.rotated(2, n)
	s.has(keys)
}

// TestReplicasRotateMasterKey rotates the master key of several copilots on a database:
// while they change KEKs, while one is killed, while one is away, and two at once.
func TestReplicasRotateMasterKey(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	d := harness.StartPostgres(t)
	var all []*stored
	for i := range 3 {
		s := &stored{t: t, dir: harness.TempDir(t), flags: []string{"--database", d.URL()}}
		if i > 0 {
			harness.Write(t, s.dir+"/master.key", harness.Read(t, all[0].dir+"/master.key"))
		}
		s.start()
		all = append(all, s)
	}
	const n = 200
	keys := all[0].create(n)

	// All use and change KEKs, and nothing fails.
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var uses, changes atomic.Int64
	for i, s := range all[1:] {
		wg.Go(func() {
			for j := 0; ; j++ {
				select {
				case <-stop:
					return
				default:
				}
				id := fmt.Sprintf("kek-%d", (i+2*j)%n)
				if s.key(id) != keys[id] {
					t.Errorf("%s has another key", id)
				}
				uses.Add(1)
				if status, body := s.request("POST", "/api/v2/keks/"+id+"/rotate", ""); status != 200 {
					t.Errorf("rotate %s: %d %s", id, status, body)
				}
				changes.Add(1)
			}
		})
	}
	for version := 2; version <= 3; version++ {
		harness.Output(t, all[0].command("master", "rotate"))
		all[0].rotated(version, n)
	}
	close(stop)
	wg.Wait()
	if uses.Load() == 0 || changes.Load() == 0 {
		t.Errorf("%d uses, %d changes", uses.Load(), changes.Load())
	}
	for _, s := range all {
		s.has(keys)
		if !strings.Contains(harness.Output(t, s.command("audit", "verify")), "none changed or missing") {
			t.Error("audit verify")
		}
	}

	// Of two at once, one begins, or they come one after the other.
	var begun atomic.Int64
	for _, s := range all {
		wg.Go(func() {
			out, err := s.command("master", "rotate").CombinedOutput()
			if err == nil {
				begun.Add(1)
			} else if !strings.Contains(string(out), "is in progress: see \"copilot master status\"") {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
	wg.Wait()
	if begun.Load() == 0 {
		t.Error("none began")
	}
	version := 3 + int(begun.Load())
	all[0].rotated(version, n)

	// The one that rotates is killed, and another one is away: both have to have the new
	// master key before the old one is dropped.
	resume := all[2].process.Pause(t)
	if status, body := all[0].request("POST", "/master/rotate", ""); status != 200 {
		t.Fatalf("%d %s", status, body)
	}
	all[0].process.Kill()
	version++
	harness.Await(t, "another copilot goes on", func() error {
		if m := all[1].status(); !m.Resealed || len(m.Waiting) != 2 || m.Keys[1].Records != n {
			return fmt.Errorf("%+v", m)
		}
		return nil
	})
	all[1].has(keys)
	resume()
	harness.Await(t, "one is left", func() error {
		if m := all[1].status(); len(m.Waiting) != 1 || !strings.HasSuffix(m.Waiting[0], ":"+all[0].dir) {
			return fmt.Errorf("%+v", m)
		}
		return nil
	})
	all[0].start()
	all[1].rotated(version, n)
	all[0].has(keys)

	// One that is gone for good, and comes back after all.
	all[2].process.Kill()
	out := harness.Output(t, all[0].command("master", "rotate"))
	if !strings.Contains(out, "until it is held by") || !strings.Contains(out, all[2].dir) {
		t.Error(out)
	}
	harness.ExpectFailure(t, all[1].command("master", "forget", "nobody"), "the store knows no holder")
	harness.ExpectFailure(t, all[1].command("master", "forget", all[1].holder()), "move it elsewhere first")
	harness.Output(t, all[1].command("master", "forget", all[2].holder()))
	all[1].rotated(version+1, n)
	harness.ExpectFailure(t, harness.Command(t, "copilot", "serve", "--dir", all[2].dir, "--database", d.URL(), "--listen", "unix://"+all[2].dir+"/copilot.sock"),
		"take it from another copilot")
	harness.Write(t, all[2].dir+"/master.key", harness.Read(t, all[0].dir+"/master.key"))
	all[2].start()
	all[2].has(keys)

	// What a newer copilot has written.
	d.Sql(t, `UPDATE copilot_keks SET record = convert_to(replace(convert_from(record, 'UTF8'), '{"master"', '{"format":2,"master"'), 'UTF8') WHERE id = 'kek-1'`)
	harness.ExpectFailure(t, all[2].command("keys", "show", "kek-1"), "see copilot's log")
	if all[2].process.Logged(t, "a newer copilot has written to the store: upgrade this one") == 0 {
		t.Error(harness.Read(t, all[2].process.Log))
	}
	d.Sql(t, `UPDATE copilot_once SET value = convert_to(replace(convert_from(value, 'UTF8'), '"format":2', '"format":3'), 'UTF8') WHERE name = 'master keys'`)
	all[2].process.Stop(t)
	harness.ExpectFailure(t, all[2].command("keys", "list"), "a newer copilot has written to the store: upgrade this one")
}

// holder is the name under which the store knows this copilot.
func (s *stored) holder() string {
	host, err := os.Hostname()
	if err != nil {
		s.t.Fatal(err)
	}
	dir, err := filepath.Abs(s.dir)
	if err != nil {
		s.t.Fatal(err)
	}
	return host + ":" + dir
}
