package integration

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
)

// inMemory returns how often a program has some bytes in its memory.
func (p *process) inMemory(t testing.TB, what []byte) (n int) {
	t.Helper()
	resume := p.pause(t)
	defer resume()
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Close()
	for line := range strings.Lines(read(t, fmt.Sprintf("/proc/%d/maps", p.cmd.Process.Pid))) {
		var from, to int64
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		if !strings.HasPrefix(mode, "rw") {
			continue
		}
		b := make([]byte, min(to-from, 1<<30))
		if got, err := memory.ReadAt(b, from); err == nil || got > 0 {
			n += bytes.Count(b[:got], what)
		}
	}
	return n
}

// TestKeysCleared looks at the memory of copilot after it gave out a KEK and
// unwrapped a layer key, and of pilot, which asked for that: neither has the key
// any more.
func TestKeysCleared(t *testing.T) {
	dir := tempDir(t)
	kek, layerKey := make([]byte, 32), make([]byte, 48)
	rand.Read(kek)
	rand.Read(layerKey)
	// Not what base64 and JSON make of it, which net/http has in its buffers.
	for name, key := range map[string][]byte{"team-exported-kek": kek, "team-a": nil} {
		args := []string{"keys", "create", "--dir", dir}
		if key != nil {
			args = []string{"keys", "import", "--dir", dir, "--file", write(t, dir+"/kek", string(key))}
		}
		output(t, command(t, "copilot", append(args, name)...))
	}
	broker := start(t, dir, "copilot", exec.Command("copilot", "serve", "--dir", dir, "--listen", "unix://"+dir+"/copilot.sock"))
	await(t, "copilot", answers(dir+"/copilot.sock"))
	for range 3 {
		if status, answer := ask(t, dir+"/copilot.sock", "GET", "/api/v2/keks/team-exported-kek/key", ""); status != 200 || !strings.Contains(answer, base64.StdEncoding.EncodeToString(kek)) {
			t.Fatalf("%d %s", status, answer)
		}
	}
	provider, _ := pilot(t, dir+"/node", "unix://"+dir+"/copilot.sock", "--annotation-format", "copilot", "--diff-listen", "off")
	node := askPilot(t, dir+"/node")
	service := ocicryptpb.NewKeyProviderServiceClient(node.conn)
	for range 3 {
		annotation, err := node.ask(t.Context(), service.WrapKey,
			object{"op": "keywrap", "keywrapparams": object{"ec": object{"Parameters": object{"pilot": []string{"dGVhbS1h"}}}, "optsdata": layerKey}},
			func(a answer) []byte { return a.Wrapped.Annotation })
		if err != nil {
			t.Fatal(err)
		}
		got, err := node.ask(t.Context(), service.UnWrapKey, object{"op": "keyunwrap", "keyunwrapparams": object{"dc": object{}, "annotation": annotation}},
			func(a answer) []byte { return a.Unwrapped.OptsData })
		if err != nil || !bytes.Equal(got, layerKey) {
			t.Fatalf("unwrapped %d bytes, %v", len(got), err)
		}
	}
	for name, p := range map[string]*process{"copilot": broker, "pilot": provider} {
		for what, key := range map[string][]byte{"exported KEK": kek, "layer key": layerKey} {
			if n := p.inMemory(t, key); n > 0 {
				t.Errorf("%s has the %s %d times", name, what, n)
			}
		}
		// The search finds what is there.
		if p.inMemory(t, []byte("/copilot.sock")) == 0 {
			t.Errorf("%s: its memory was not searched", name)
		}
	}
}
