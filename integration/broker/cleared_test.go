package broker

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	ocicryptpb "github.com/containers/ocicrypt/utils/keyprovider"
	"github.com/ctrlplane/pilot/integration/harness"
)

// countInMemory returns how often a program has some bytes in its memory.
func countInMemory(t testing.TB, p *harness.Process, what []byte) (n int) {
	t.Helper()
	resume := p.Pause(t)
	defer resume()
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", p.Cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Close()
	for line := range strings.Lines(harness.Read(t, fmt.Sprintf("/proc/%d/maps", p.Cmd.Process.Pid))) {
		var from, to uint64
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		if !strings.HasPrefix(mode, "rw") {
			continue
		}
		b := make([]byte, min(to-from, 1<<30))
		if got, err := memory.ReadAt(b, int64(from)); err == nil || got > 0 {
			n += bytes.Count(b[:got], what)
		}
	}
	return n
}

// TestKeysAreClearedFromMemory searches the memory of copilot after it has exported a KEK and unwrapped
// a layer key, and of pilot, which requested that: neither has the key any more.
func TestKeysAreClearedFromMemory(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	kek, layerKey := make([]byte, 32), make([]byte, 48)
	rand.Read(kek)
	rand.Read(layerKey)
	// Not what base64 and JSON make of it, which net/http has in its buffers.
	for name, key := range map[string][]byte{"team-exported-kek": kek, "team-a": nil} {
		args := []string{"keys", "create", "--dir", dir}
		if key != nil {
			args = []string{"keys", "import", "--dir", dir, "--file", harness.Write(t, dir+"/kek", string(key))}
		}
		harness.Output(t, harness.Command(t, "copilot", append(args, name)...))
	}
	broker := harness.Start(t, dir, "copilot", exec.Command("copilot", "serve", "--dir", dir, "--listen", "unix://"+dir+"/copilot.sock"))
	harness.Await(t, "copilot", harness.Reachable(dir+"/copilot.sock"))
	for range 3 {
		if status, answer := harness.RequestOverSocket(t, dir+"/copilot.sock", "GET", "/api/v2/keks/team-exported-kek/key", ""); status != 200 || !strings.Contains(answer, base64.StdEncoding.EncodeToString(kek)) {
			t.Fatalf("%d %s", status, answer)
		}
	}
	for range 3 {
		status, wrapped := harness.RequestOverSocket(t, dir+"/copilot.sock", "POST", "/api/v2/keks/team-a/wrap", `{"plaintext":"`+base64.StdEncoding.EncodeToString(layerKey)+`"}`)
		if status != 200 {
			t.Fatalf("%d %s", status, wrapped)
		}
		status, answer := harness.RequestOverSocket(t, dir+"/copilot.sock", "POST", "/api/v2/keks/team-a/unwrap", strings.Replace(wrapped, `"id":"team-a",`, "", 1))
		if status != 200 || !strings.Contains(answer, base64.StdEncoding.EncodeToString(layerKey)) {
			t.Fatalf("%d %s", status, answer)
		}
	}
	provider, _ := harness.StartPilot(t, dir+"/node", "unix://"+dir+"/copilot.sock", "--annotation-format", "copilot", "--diff-listen", "off")
	node := harness.NewPilotClient(t, dir+"/node")
	service := ocicryptpb.NewKeyProviderServiceClient(node.Conn)
	for range 3 {
		annotation, err := node.Call(t.Context(), service.WrapKey,
			harness.Object{"op": "keywrap", "keywrapparams": harness.Object{"ec": harness.Object{"Parameters": harness.Object{"pilot": []string{"dGVhbS1h"}}}, "optsdata": layerKey}},
			func(a harness.KeyProviderOutput) []byte { return a.Wrapped.Annotation })
		if err != nil {
			t.Fatal(err)
		}
		got, err := node.Call(t.Context(), service.UnWrapKey, harness.Object{"op": "keyunwrap", "keyunwrapparams": harness.Object{"dc": harness.Object{}, "annotation": annotation}},
			func(a harness.KeyProviderOutput) []byte { return a.Unwrapped.OptsData })
		if err != nil || !bytes.Equal(got, layerKey) {
			t.Fatalf("unwrapped %d bytes, %v", len(got), err)
		}
	}
	for name, p := range map[string]*harness.Process{"copilot": broker, "pilot": provider} {
		for what, key := range map[string][]byte{"exported KEK": kek, "layer key": layerKey} {
			if n := countInMemory(t, p, key); n > 0 {
				t.Errorf("%s has the %s %d times", name, what, n)
			}
		}
		// The search works.
		if countInMemory(t, p, []byte("/copilot.sock")) == 0 {
			t.Errorf("%s: its memory was not searched", name)
		}
	}
}
