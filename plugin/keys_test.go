package plugin

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/errdefs"
	"github.com/containerd/imgcrypt/v2"
	"github.com/containerd/typeurl/v2"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/sirupsen/logrus"
)

// TestClientsKeysApart has clients with keys of their own unpack at once, beside
// several keys of the node, and looks whether their keys stay.
func TestClientsKeysApart(t *testing.T) {
	s, others := newStore(t), newKeys(t)
	clients := []keys{newKeys(t), newKeys(t)}
	var descs []ocispec.Descriptor
	for _, k := range clients {
		descs = append(descs, put(t, s, k, layerType, tarball(t, 5), unchanged))
	}
	private := others.dc.Parameters["privkeys"][0]
	for n := range 9 {
		dir := t.TempDir()
		for i := range n {
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%d.pem", i)), private, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		d := New(s, nil, Config{DecryptionKeysPath: dir})
		var wg sync.WaitGroup
		for i := range 16 {
			desc := descs[i%2]
			payload, err := typeurl.MarshalAny(&imgcrypt.Payload{DecryptConfig: *clients[i%2].dc, Descriptor: desc})
			if err != nil {
				t.Fatal(err)
			}
			mounts, _ := overlay(t)
			wg.Go(func() {
				if _, err := d.Apply(t.Context(), desc, mounts, diff.WithPayloads(map[string]typeurl.Any{"a": payload})); err != nil {
					t.Errorf("%d keys of the node, client %d: %v", n, i%2, err)
				}
			})
		}
		wg.Wait()
		for _, desc := range descs {
			mounts, _ := overlay(t)
			if _, err := d.Apply(t.Context(), desc, mounts); !errdefs.IsFailedPrecondition(err) {
				t.Errorf("%d keys of the node, after the clients: %v", n, err)
			}
		}
	}
}

// lockedBuffer is a log.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestKeysReported looks at the log and the metrics of keys that come and go.
func TestKeysReported(t *testing.T) {
	log := &lockedBuffer{}
	logrus.SetOutput(log)
	t.Cleanup(func() { logrus.SetOutput(os.Stderr) })
	s, k := newStore(t), newKeys(t)
	desc := put(t, s, k, layerType, tarball(t, 5), unchanged)
	readme := filepath.Join(k.dir, "README")
	if err := os.WriteFile(readme, []byte("keys"), 0o600); err != nil {
		t.Fatal(err)
	}
	metrics := prometheus.NewRegistry()
	d := New(s, nil, Config{DecryptionKeysPath: k.dir, Metrics: metrics})
	gauges := func(usable, unusable int) {
		t.Helper()
		want := fmt.Sprintf(`# HELP pilot_decryption_keys Files in decryption-keys-path, by whether they can be used to decrypt.
# TYPE pilot_decryption_keys gauge
pilot_decryption_keys{state="unusable"} %d
pilot_decryption_keys{state="usable"} %d
`, unusable, usable)
		if err := testutil.GatherAndCompare(metrics, strings.NewReader(want), "pilot_decryption_keys"); err != nil {
			t.Error(err)
		}
	}
	// The log says so without a layer, and once.
	for strings.Count(log.String(), "decryption keys read") == 0 {
		time.Sleep(time.Millisecond)
	}
	apply := func() error {
		mounts, _ := overlay(t)
		_, err := d.Apply(t.Context(), desc, mounts)
		return err
	}
	for range 3 {
		if err := apply(); err != nil {
			t.Error(err)
		}
		gauges(1, 1)
	}
	if err := os.Remove(filepath.Join(k.dir, "key.pem")); err != nil {
		t.Fatal(err)
	}
	gauges(0, 1)
	for range 3 {
		if err := apply(); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), readme) {
			t.Error(err)
		}
	}
	// The errors of the layers repeat it.
	var text string
	for line := range strings.Lines(log.String()) {
		if !strings.Contains(line, "layer not decrypted") {
			text += line
		}
	}
	for part, want := range map[string]int{"decryption keys read": 2, " usable=1": 1, " usable=0": 1, readme: 2, "neither a private key nor a certificate": 2, "PRIVATE KEY": 0} {
		if n := strings.Count(text, part); n != want {
			t.Errorf("%q is there %d times, want %d:\n%s", part, n, want, text)
		}
	}
}
