package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/integration/harness"
)

// BenchmarkRotateMaster has copilot unwrap 1,000 times a second, or as often as
// PILOT_UNWRAPS says, with KEKs of 100,000, or as many as PILOT_KEKS says, then the same
// while it rotates the master key. It reports the 99th percentile of both, and how many
// failed.
func BenchmarkRotateMaster(b *testing.B) {
	count, rate := number(b, "PILOT_KEKS", 100_000), number(b, "PILOT_UNWRAPS", 1000)
	b.Run("file", func(b *testing.B) { rotateMaster(b, "", count, rate) })
	b.Run("PostgreSQL", func(b *testing.B) { rotateMaster(b, harness.StartPostgres(b).URL(), count, rate) })
}

// number returns a variable's number, or n if it is not set.
func number(b *testing.B, name string, n int) int {
	if s := os.Getenv(name); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil {
			b.Fatalf("%s: %v", name, err)
		}
	}
	return n
}

// BenchmarkBackup backs up 100,000 KEKs, or as many as PILOT_KEKS says, while copilot serves
// them, and reports the most memory that each of the two has had, and copilot before it.
func BenchmarkBackup(b *testing.B) {
	count := number(b, "PILOT_KEKS", 100_000)
	b.Run("file", func(b *testing.B) { backUp(b, "", count) })
	b.Run("PostgreSQL", func(b *testing.B) { backUp(b, harness.StartPostgres(b).URL(), count) })
}

func backUp(b *testing.B, database string, count int) {
	dir := harness.TempDir(b)
	fill(b, dir, database, count)
	identity, err := age.GenerateHybridIdentity()
	if err != nil {
		b.Fatal(err)
	}
	flags := []string{"--dir", dir}
	if database != "" {
		flags = append(flags, "--database", database)
	}
	broker := harness.Start(b, dir, "copilot", exec.Command("copilot", append([]string{"serve", "--listen", "unix://" + dir + "/copilot.sock"}, flags...)...))
	harness.Await(b, "copilot", harness.Reachable(dir+"/admin.sock"))
	before := broker.Peak(b)
	var command float64
	for i := 0; b.Loop(); i++ {
		cmd := harness.Command(b, "copilot", append([]string{"backup", "--recipient", identity.Recipient().String(), "--out", fmt.Sprintf("%s/%d.backup", dir, i)}, flags...)...)
		command = max(command, runWatched(b, cmd, func() {}))
	}
	b.ReportMetric(command*1e6/(1<<20), "command-MiB")
	b.ReportMetric(float64(before)/(1<<20), "broker-before-MiB")
	b.ReportMetric(float64(broker.Peak(b))/(1<<20), "broker-MiB")
}

const (
	wrappedKEKs = 1000
	quietFor    = 20 * time.Second
	// inFlight bounds the requests at a time, where a machine is too slow for the rate.
	inFlight = 256
)

func rotateMaster(b *testing.B, database string, count, rate int) {
	dir := harness.TempDir(b)
	fill(b, dir, database, count)
	args := []string{"serve", "--dir", dir, "--listen", "unix://" + dir + "/copilot.sock"}
	if database != "" {
		args = append(args, "--database", database)
	}
	harness.Start(b, dir, "copilot", exec.Command("copilot", args...))
	harness.Await(b, "copilot", harness.Reachable(dir+"/admin.sock"))
	c := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 256, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", dir+"/admin.sock")
	}}}
	call := func(method, path, body string) ([]byte, error) {
		r, err := http.NewRequest(method, "http://copilot"+path, bytes.NewReader([]byte(body)))
		if err != nil {
			return nil, err
		}
		resp, err := c.Do(r)
		if err != nil {
			return nil, err
		}
		defer resp.Body.Close()
		answer, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s: %s", resp.Status, answer)
		}
		return answer, err
	}
	var paths, bodies []string
	for range wrappedKEKs {
		path := "/api/v2/keks/" + kekName(rand.N(count))
		wrapped, err := call("POST", path+"/wrap", `{"plaintext":"c2VjcmV0"}`)
		if err != nil {
			b.Fatal(err)
		}
		var w map[string]any
		if err := json.Unmarshal(wrapped, &w); err != nil {
			b.Fatal(err)
		}
		delete(w, "id")
		body, _ := json.Marshal(w)
		paths, bodies = append(paths, path+"/unwrap"), append(bodies, string(body))
	}
	// measure unwraps at a steady rate until it is stopped. A request counts from when it
	// was due.
	measure := func(stop func() bool) (p50, p99 time.Duration, failed int) {
		var mu sync.Mutex
		var took []time.Duration
		var wg sync.WaitGroup
		turns := make(chan struct{}, inFlight)
		begin := time.Now()
		for i := 0; !stop(); i++ {
			due := begin.Add(time.Duration(i) * time.Second / time.Duration(rate))
			time.Sleep(time.Until(due))
			turns <- struct{}{}
			wg.Go(func() {
				defer func() { <-turns }()
				at := rand.N(wrappedKEKs)
				_, err := call("POST", paths[at], bodies[at])
				mu.Lock()
				defer mu.Unlock()
				took = append(took, time.Since(due))
				if err != nil {
					failed++
					b.Log(err)
				}
			})
		}
		wg.Wait()
		slices.Sort(took)
		return took[len(took)/2], took[len(took)*99/100], failed
	}
	for b.Loop() {
		until := time.Now().Add(quietFor)
		quiet50, quiet99, failedBefore := measure(func() bool { return time.Now().After(until) })
		begin := time.Now()
		if _, err := call("POST", "/master/rotate", ""); err != nil {
			b.Fatal(err)
		}
		done := make(chan time.Duration, 1)
		go func() {
			for {
				time.Sleep(200 * time.Millisecond)
				var status struct{ Rotating bool }
				if answer, err := call("GET", "/master/rotation", ""); err == nil && json.Unmarshal(answer, &status) == nil && !status.Rotating {
					done <- time.Since(begin)
					return
				}
			}
		}()
		var duration time.Duration
		busy50, busy99, failed := measure(func() bool {
			select {
			case duration = <-done:
				return true
			default:
				return false
			}
		})
		for unit, value := range map[string]float64{
			"quiet-p50-ms": ms(quiet50), "quiet-p99-ms": ms(quiet99), "rotating-p50-ms": ms(busy50), "rotating-p99-ms": ms(busy99),
			"p99-ratio": float64(busy99) / float64(quiet99), "s/rotation": duration.Seconds(), "failed": float64(failed + failedBefore),
		} {
			b.ReportMetric(value, unit)
		}
	}
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func kekName(i int) string { return fmt.Sprintf("team-%d", i) }

// fill makes a store with KEKs.
func fill(b *testing.B, dir, database string, count int) {
	b.Helper()
	at := dir
	if database == "" {
		// In memory, where a change costs no disk, and then to where it belongs.
		var err error
		if at, err = os.MkdirTemp("/dev/shm", "pilot-bench-"); err != nil {
			b.Fatal(err)
		}
		defer os.RemoveAll(at)
	}
	s, err := keystore.Open(b.Context(), at, database)
	if err != nil {
		b.Fatal(err)
	}
	var wg sync.WaitGroup
	const workers = 8
	for w := range workers {
		wg.Go(func() {
			for i := w; i < count; i += workers {
				if _, err := s.Create(b.Context(), kekName(i), nil, keystore.Change{}); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
	if at != dir {
		for _, name := range []string{"keks.db", "master.key"} {
			harness.Write(b, dir+"/"+name, harness.Read(b, at+"/"+name))
		}
	}
}
