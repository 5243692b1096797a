package keyprovider

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containers/ocicrypt/config"
	ocicrypt "github.com/containers/ocicrypt/keywrap/keyprovider"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/copilot/pki"
	broker "github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// testBroker is a real broker.
type testBroker struct {
	dir  string
	url  string      // of its socket
	keys broker.Keys // through its admin socket
	tcp  string      // http://HOST:PORT, which the original's API needs
}

// startBroker runs a broker that has the KEKs given, nil ones new.
func startBroker(t testing.TB, keks map[string][]byte) *testBroker {
	t.Helper()
	address := loopbacktest.FreeAddress(t)
	b := &testBroker{dir: t.TempDir(), tcp: "http://" + address}
	// The socket is opened last, so once it answers the address does too.
	socket := filepath.Join(b.dir, "s")
	b.url = "unix://" + socket
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	ca, err := pki.Create(b.dir, "example.com", 24*time.Hour)
	if err == nil {
		err = ca.IssueSigner(b.dir, time.Hour, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		done <- broker.Serve(ctx, broker.Config{
			Dir: b.dir, Listen: []string{address, b.url}, InsecureLoopback: true,
			PublicKeysCert: filepath.Join(b.dir, pki.SignerCertFile), PublicKeysKey: filepath.Join(b.dir, pki.SignerKeyFile),
		})
	}()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	for range 6000 { // a minute
		conn, err := net.Dial("unix", socket)
		if err != nil {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		conn.Close()
		if b.keys, err = broker.OpenKeys(t.Context(), broker.Config{Dir: b.dir}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { b.keys.Close() })
		for id, key := range keks {
			if _, err := b.keys.Create(t.Context(), id, key); err != nil {
				t.Fatal(err)
			}
		}
		return b
	}
	t.Fatal("the broker does not start")
	return nil
}

// rotate gives a KEK so many new versions.
func (b *testBroker) rotate(t testing.TB, id string, times int) {
	t.Helper()
	for range times {
		if _, err := b.keys.Rotate(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
}

// asked counts how often the broker was asked for a KEK.
func (b *testBroker) asked(t testing.TB, id string) int {
	t.Helper()
	log, err := os.ReadFile(filepath.Join(b.dir, "audit.log"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(log), `"action":"export","kek":"`+id+`"`)
}

// newProvider returns a provider with nothing in its cache.
func newProvider(t testing.TB, url string, conf Config) *Provider {
	t.Helper()
	c, err := client.New(client.Config{URLs: []string{url}, Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	return New(c, conf)
}

const secret = `{"symkey":"…"}`

// named are the parameters of recipients or of keys provider:pilot:ID.
func named(ids ...string) [][]byte {
	list := [][]byte{}
	for _, id := range ids {
		list = append(list, []byte(id))
	}
	return list
}

func parameters(ids []string) map[string][][]byte {
	return map[string][][]byte{"pilot": named(ids...)}
}

func wrapRequest(t testing.TB, ids ...string) []byte {
	t.Helper()
	return request(t, ocicrypt.KeyProviderKeyWrapProtocolInput{Operation: ocicrypt.OpKeyWrap, KeyWrapParams: ocicrypt.KeyWrapParams{
		Ec: &config.EncryptConfig{Parameters: parameters(ids)}, OptsData: []byte(secret),
	}})
}

func unwrapRequest(t testing.TB, annotation []byte, ids ...string) []byte {
	t.Helper()
	return request(t, ocicrypt.KeyProviderKeyWrapProtocolInput{Operation: ocicrypt.OpKeyUnwrap, KeyUnwrapParams: ocicrypt.KeyUnwrapParams{
		Dc: &config.DecryptConfig{Parameters: parameters(ids)}, Annotation: annotation,
	}})
}

func request(t testing.TB, in ocicrypt.KeyProviderKeyWrapProtocolInput) []byte {
	t.Helper()
	b, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// wrapFor returns the annotation of the secret, wrapped for KEKs.
func wrapFor(t testing.TB, p *Provider, ids ...string) []byte {
	t.Helper()
	annotation, err := p.WrapKey(t.Context(), named(ids...), []byte(secret))
	if err != nil {
		t.Fatal(err)
	}
	return annotation
}

// unwraps unwraps an annotation, with the KEKs that are named if any are. It
// is an error of the test if what comes out is not the secret.
func unwraps(t testing.TB, p *Provider, annotation []byte, ids ...string) error {
	t.Helper()
	got, err := p.UnwrapKey(t.Context(), named(ids...), annotation)
	if err != nil {
		return err
	}
	if string(got) != secret {
		t.Errorf("it unwraps to %q", got)
	}
	return nil
}

func answerOf(t testing.TB, b []byte) (out ocicrypt.KeyProviderKeyWrapProtocolOutput) {
	t.Helper()
	if err := json.Unmarshal(b, &out); err != nil {
		t.Fatal(err)
	}
	return out
}
