package faults

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
)

// rounds is how often something is killed: PILOT_ROUNDS, or a few.
func rounds(t *testing.T) int {
	t.Helper()
	s := os.Getenv("PILOT_ROUNDS")
	if s == "" {
		return 12
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatalf("PILOT_ROUNDS: %v", err)
	}
	return n
}

// TestKilledAtRandomLeavesWholeImages kills one of those that take part in an encryption, a
// decryption or a pull, at some moment of it. What was there before stays, what
// was begun is whole or not there, and the next try works. `make test-long` does
// so some hundred times.
func TestKilledAtRandomLeavesWholeImages(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))

	dir := harness.TempDir(t)
	_, brokerURL := harness.StartBroker(t, dir+"/broker", "team-a")
	// The machine's directories are on a disk; sockets outlive processes.
	home := harness.TempDir(t)
	provider := harness.StartActivatedPilot(t, home, brokerURL)
	conf := harness.Write(t, home+"/ocicrypt.conf", `{"key-providers": {"pilot": {"grpc": "unix://`+home+`/keyprovider.sock"}}}`)
	n := harness.NewDifferNode(t, home, harness.DifferConfig{Containerd: harness.Containerd2()})
	n.Ocicrypt = conf
	address, _ := harness.StartRegistry(t, dir)
	const layers, size = 3, 24 << 20
	imported := func(name string, salt int) {
		l := harness.NewLayout(t)
		var blobs []harness.Object
		var ids []string
		for i := range layers {
			content := make([]byte, size)
			for j := range content {
				content[j] = byte(salt + i + j + j>>8 + j>>16)
			}
			layer, id := l.Layer(harness.LayerKinds[0], harness.LayerKinds[0].OCI, map[string][]byte{fmt.Sprintf("file%d", i): content})
			blobs, ids = append(blobs, layer), append(ids, id)
		}
		harness.Output(t, n.CtrPilot("images", "import", "--no-unpack", l.Tar(dir+"/image.tar", name, l.Manifest(blobs, ids))))
	}
	encrypt := func(from, to string) *exec.Cmd {
		return n.CtrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", from, to)
	}
	// One to encrypt and decrypt, and another that is in the registry only.
	plain, encrypted, decrypted := "example.com/big:1", "example.com/big:encrypted", "example.com/big:decrypted"
	imported(plain, 0)
	pushed := address + "/big:1"
	imported("example.com/other:1", 100)
	harness.Output(t, encrypt("example.com/other:1", pushed))
	harness.Output(t, n.CtrPilot("images", "push", "--plain-http", pushed))
	harness.Output(t, n.CtrPilot("images", "remove", "--sync", pushed, "example.com/other:1"))
	digest := func(image string) string {
		for line := range strings.Lines(harness.Output(t, n.Ctr("images", "list"))) {
			if f := strings.Fields(line); f[0] == image {
				return f[2]
			}
		}
		return ""
	}
	original := digest(plain)

	works := []struct {
		name string
		run  func() *exec.Cmd
		made string // the image that it makes
	}{
		{"encrypt", func() *exec.Cmd { return encrypt(plain, encrypted) }, encrypted},
		{"decrypt", func() *exec.Cmd { return n.CtrPilot("images", "decrypt", encrypted, decrypted) }, decrypted},
		{"pull", func() *exec.Cmd { return n.Ctr("images", "pull", "--plain-http", pushed) }, pushed},
	}
	victims := []string{"pilot", "containerd", "the client"}
	killed := map[string]int{}
	took := map[string]time.Duration{"encrypt": time.Second, "decrypt": time.Second, "pull": time.Second}
	for round := range rounds(t) {
		work, victim := works[random.IntN(len(works))], victims[random.IntN(len(victims))]
		what := fmt.Sprintf("round %d: %s, %s killed", round, work.name, victim)
		if work.name == "decrypt" {
			harness.Output(t, encrypt(plain, encrypted))
		}
		after := time.Duration(random.Int64N(int64(took[work.name])))
		cmd := work.run()
		var said bytes.Buffer
		cmd.Stderr = &said
		began := time.Now()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		select {
		case err := <-done:
			took[work.name] = time.Since(began)
			if err != nil {
				t.Fatalf("%s: it failed before: %v: %s", what, err, &said)
			}
			done <- err
		case <-time.After(after):
			killed[work.name+", "+victim]++
		}
		switch victim {
		case "pilot":
			provider.Kill()
			provider = harness.StartActivatedPilot(t, home, brokerURL)
		case "containerd":
			n.Kill()
			n.Start(t)
		case "the client":
			cmd.Process.Kill()
		}
		if err := <-done; err == nil && digest(work.made) == "" {
			t.Errorf("%s: it succeeded, and there is no %s", what, work.made)
		}
		// Whole, or not there: a second of the same name needs no --force.
		if digest(work.made) != "" {
			harness.Output(t, n.Ctr("images", "remove", "--sync", work.made))
		}
		var err error
		for deadline := time.Now().Add(harness.Timeout); ; time.Sleep(100 * time.Millisecond) {
			var out []byte
			if out, err = work.run().CombinedOutput(); err == nil {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: it does not work again: %v\n%s", what, err, out)
			}
		}
		if work.name == "decrypt" && digest(decrypted) != original || digest(plain) != original {
			t.Errorf("%s: the image was %s, is %s, and decrypted %s", what, original, digest(plain), digest(decrypted))
		}
		if work.name == "encrypt" {
			// What the next try made decrypts to the same.
			harness.Output(t, n.CtrPilot("images", "decrypt", encrypted, decrypted))
			if got := digest(decrypted); got != original {
				t.Errorf("%s: encrypted and decrypted it is %s, and was %s", what, got, original)
			}
		}
		for _, image := range []string{encrypted, decrypted, pushed} {
			if digest(image) != "" {
				harness.Output(t, n.Ctr("images", "remove", "--sync", image))
			}
		}
		expectAbandoned(t, n, what)
		if t.Failed() {
			return
		}
	}
	t.Logf("killed in the middle: %v", killed)
	if len(killed) == 0 {
		t.Error("nothing was killed in the middle")
	}
}

// expectAbandoned checks that what killed work left is held by leases that expire, and
// by nothing else.
func expectAbandoned(t testing.TB, n *harness.Node, what string) {
	t.Helper()
	for line := range strings.Lines(harness.Output(t, n.Ctr("leases", "list"))) {
		f := strings.Fields(line)
		if f[0] == "ID" {
			continue
		}
		if !strings.Contains(line, "containerd.io/gc.expire=") {
			t.Errorf("%s: a lease that never expires: %s", what, line)
		}
		harness.Output(t, n.Ctr("leases", "delete", "--sync", f[0]))
	}
	n.CollectGarbage(t)
	n.ExpectNoTraces(t)
}
