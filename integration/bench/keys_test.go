package bench

import (
	"encoding/json"
	"fmt"
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
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
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
	harness.StartPilot(b, dir, brokerURL)
	var clients []pb.KeyProviderServiceClient
	for range callers {
		conn, err := grpc.NewClient("unix://"+dir+"/keyprovider.sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			b.Fatal(err)
		}
		defer conn.Close()
		clients = append(clients, pb.NewKeyProviderServiceClient(conn))
	}
	request := func(in protocol.KeyProviderKeyWrapProtocolInput) *pb.KeyProviderKeyWrapProtocolInput {
		text, err := json.Marshal(in)
		if err != nil {
			b.Fatal(err)
		}
		return &pb.KeyProviderKeyWrapProtocolInput{KeyProviderKeyWrapProtocolInput: text}
	}
	secret := []byte(strings.Repeat("layer key", 20))
	out, err := clients[0].WrapKey(b.Context(), request(protocol.KeyProviderKeyWrapProtocolInput{
		Operation:     protocol.OpKeyWrap,
		KeyWrapParams: protocol.KeyWrapParams{Ec: &config.EncryptConfig{Parameters: map[string][][]byte{"pilot": {[]byte("team-a")}}}, OptsData: secret},
	}))
	if err != nil {
		b.Fatal(err)
	}
	var wrapped protocol.KeyProviderKeyWrapProtocolOutput
	if err := json.Unmarshal(out.KeyProviderKeyWrapProtocolOutput, &wrapped); err != nil {
		b.Fatal(err)
	}
	unwrap := request(protocol.KeyProviderKeyWrapProtocolInput{
		Operation:       protocol.OpKeyUnwrap,
		KeyUnwrapParams: protocol.KeyUnwrapParams{Dc: &config.DecryptConfig{}, Annotation: wrapped.KeyWrapResults.Annotation},
	})

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
					out, err := c.UnWrapKey(b.Context(), unwrap)
					if err == nil && !strings.Contains(string(out.KeyProviderKeyWrapProtocolOutput), "optsdata") {
						err = fmt.Errorf("answer %q", out.KeyProviderKeyWrapProtocolOutput)
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
}
