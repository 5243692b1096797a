package bench

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containers/ocicrypt/config"
	protocol "github.com/containers/ocicrypt/keywrap/keyprovider"
	pb "github.com/containers/ocicrypt/utils/keyprovider"
	"github.com/ctrlplane/pilot/integration/harness"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// callers is how many ask for layer keys at once.
const callers = 64

// BenchmarkUnwrap measures how many layer keys pilot unwraps with a KEK that it
// has, over its socket, and how long each takes. The callers are in the same
// machine, as they are on a node.
func BenchmarkUnwrap(b *testing.B) {
	defer debug.SetGCPercent(debug.SetGCPercent(1000)) // of the callers
	dir := benchDir(b)
	_, brokerURL := harness.StartBroker(b, dir+"/broker", "team-a")
	pilot, _ := harness.StartPilot(b, dir, brokerURL)
	// message returns a gRPC message with its prefix.
	message := func(in protocol.KeyProviderKeyWrapProtocolInput) []byte {
		text, err := json.Marshal(in)
		if err != nil {
			b.Fatal(err)
		}
		field := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), text)
		return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(field))), field...)
	}
	socket := dir + "/keyprovider.sock"
	secret := []byte(strings.Repeat("layer key", 20))
	out, err := newCaller(b, socket, pb.KeyProviderService_WrapKey_FullMethodName, message(protocol.KeyProviderKeyWrapProtocolInput{
		Operation:     protocol.OpKeyWrap,
		KeyWrapParams: protocol.KeyWrapParams{Ec: &config.EncryptConfig{Parameters: map[string][][]byte{"pilot": {[]byte("team-a")}}}, OptsData: secret},
	})).call()
	if err != nil {
		b.Fatal(err)
	}
	var answer pb.KeyProviderKeyWrapProtocolOutput
	if err := proto.Unmarshal(out[5:], &answer); err != nil {
		b.Fatal(err)
	}
	var wrapped protocol.KeyProviderKeyWrapProtocolOutput
	if err := json.Unmarshal(answer.KeyProviderKeyWrapProtocolOutput, &wrapped); err != nil {
		b.Fatal(err)
	}
	unwrap := message(protocol.KeyProviderKeyWrapProtocolInput{
		Operation:       protocol.OpKeyUnwrap,
		KeyUnwrapParams: protocol.KeyUnwrapParams{Dc: &config.DecryptConfig{}, Annotation: wrapped.KeyWrapResults.Annotation},
	})
	var clients []*caller
	for range callers {
		clients = append(clients, newCaller(b, socket, pb.KeyProviderService_UnWrapKey_FullMethodName, unwrap))
	}

	// ask has all callers ask for two seconds, each with a pause after a call
	// began before the next, and returns how long each call took, sorted.
	const lasts = 2 * time.Second
	ask := func(pause time.Duration) []time.Duration {
		var mu sync.Mutex
		var all []time.Duration
		var failed error
		var wg sync.WaitGroup
		end := time.Now().Add(lasts)
		for i, c := range clients {
			wg.Go(func() {
				var own []time.Duration
				next := time.Now().Add(pause / callers * time.Duration(i))
				for time.Now().Before(end) {
					time.Sleep(time.Until(next))
					next = next.Add(pause)
					start := time.Now()
					out, err := c.call()
					if err == nil && !bytes.Contains(out, []byte(`"optsdata"`)) {
						err = fmt.Errorf("answer %q", out)
					}
					if err != nil {
						mu.Lock()
						failed = err
						mu.Unlock()
						return
					}
					own = append(own, time.Since(start))
				}
				mu.Lock()
				all = append(all, own...)
				mu.Unlock()
			})
		}
		wg.Wait()
		if failed != nil {
			b.Fatal(failed)
		}
		slices.Sort(all)
		return all
	}
	b.Run("Rate", func(b *testing.B) {
		measure(b, comparison{fmt.Sprintf("layer keys unwrapped, %d callers", callers), "target", "/s", "≥ 1"}, 25000, func() float64 {
			return float64(len(ask(0))) / lasts.Seconds()
		})
	})
	percentile := func(all []time.Duration) float64 {
		return float64(all[len(all)*99/100]) / float64(time.Millisecond)
	}
	b.Run("Tail", func(b *testing.B) {
		measure(b, comparison{fmt.Sprintf("99th percentile, %d callers who ask again at once", callers), "target", "ms", "≤ 1"}, 6, func() float64 {
			return percentile(ask(0))
		})
	})
	b.Run("Latency", func(b *testing.B) {
		measure(b, comparison{fmt.Sprintf("99th percentile, %d callers who ask 2,000 times a second together", callers), "target", "ms", "≤ 1"}, 1, func() float64 {
			return percentile(ask(callers * time.Second / 2000))
		})
	})
	b.Run("CPU", func(b *testing.B) {
		var of [2]float64 // pilot and the callers, for one layer key
		compare(b, comparison{"processor time of pilot for a layer key", "that of its callers", "µs", ""}, func() float64 {
			pids := []int{pilot.Cmd.Process.Pid, os.Getpid()}
			for i, pid := range pids {
				of[i] = -cpuTime(b, pid)
			}
			n := len(ask(0))
			for i, pid := range pids {
				of[i] = (of[i] + cpuTime(b, pid)) / float64(n)
			}
			return of[0]
		}, func() float64 { return of[1] })
	})
}

// cpuTime returns how much processor time a process has used, in microseconds.
func cpuTime(b *testing.B, pid int) float64 {
	b.Helper()
	const tick = 1e6 / 100 // USER_HZ, proc_pid_stat(5)
	_, rest, _ := strings.Cut(harness.Read(b, fmt.Sprintf("/proc/%d/stat", pid)), ") ")
	fields := strings.Fields(rest)
	var user, system float64
	if _, err := fmt.Sscan(fields[11]+" "+fields[12], &user, &system); err != nil {
		b.Fatal(err)
	}
	return (user + system) * tick
}
