package mirror

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// stuck opens a connection to the mirror, asks for a path and reads no more than the
// answer's head.
func (n *node) stuck(path string) net.Conn {
	n.t.Helper()
	conn, err := net.Dial("tcp", n.mirror)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { conn.Close() })
	// So that the answer does not fit into the kernel's buffers.
	if err := conn.(*net.TCPConn).SetReadBuffer(4 << 10); err != nil {
		n.t.Fatal(err)
	}
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nPilot-Secret: %s\r\n\r\n", path, n.mirror, n.secret)
	return conn
}

// TestHundredSlowCallersHoldUpNobody has callers that take nothing of a layer: others are
// served beside them, the mirror's memory stays bounded, and what they hold is given back
// when they go.
func TestHundredSlowCallersHoldUpNobody(t *testing.T) {
	t.Parallel()
	n, f, plain, layer := bigNode(t)
	n.get(manifestPath("big", plain)).expect(t, "manifest", http.StatusOK)
	before := n.pilot.Peak(t)
	var conns []net.Conn
	for range 150 {
		conns = append(conns, n.stuck(blobPath("big", layer)))
	}
	harness.Await(t, "the mirror sends as many as it may", func() error {
		if now := f.underWay(); now < 16 {
			return fmt.Errorf("%d", now)
		}
		return nil
	})
	// Manifests need no turn, and a layer gets one once those before it have lost theirs.
	n.get(manifestPath("big", "enc")).expect(t, "manifest beside them", http.StatusOK)
	if r := n.get(blobPath("big", layer)); r.status != http.StatusOK || digestOf(r.body) != layer {
		t.Errorf("layer beside them: %d %v %.300s", r.status, r.err, r.body)
	}
	if now := f.underWay(); now > 32 {
		t.Errorf("the registry sends %d layers at once", now)
	}
	if grown := n.pilot.Peak(t) - before; grown > 160<<20 {
		t.Errorf("the mirror takes %d MiB more for them", grown>>20)
	}
	for _, c := range conns {
		c.Close()
	}
	harness.Await(t, "the registry has nothing more to send", func() error {
		if now := f.underWay(); now > 0 {
			return fmt.Errorf("%d", now)
		}
		return nil
	})
	harness.NewPilotClient(t, n.dir).CheckLeaks(t, "go_goroutines", 60)
}

// TestCallerThatHangsUpEndsTheRequestToTheRegistry reads the beginning of a layer.
func TestCallerThatHangsUpEndsTheRequestToTheRegistry(t *testing.T) {
	t.Parallel()
	n, f, plain, layer := bigNode(t)
	n.get(manifestPath("big", plain)).expect(t, "manifest", http.StatusOK)
	for range 10 {
		conn := n.stuck(blobPath("big", layer))
		if _, err := io.CopyN(io.Discard, bufio.NewReader(conn), 20<<10); err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	harness.Await(t, "the registry has nothing more to send", func() error {
		if now := f.underWay(); now > 0 {
			return fmt.Errorf("%d", now)
		}
		return nil
	})
}

// TestManyCallersAtOnce has callers pull the same layer at the same time.
func TestManyCallersAtOnce(t *testing.T) {
	t.Parallel()
	n, _, plain, layer := bigNode(t)
	var wg sync.WaitGroup
	for range 24 {
		wg.Go(func() {
			for path, want := range map[string]string{manifestPath("big", "enc"): plain, blobPath("big", layer): layer} {
				if r := n.get(path); digestOf(r.body) != want {
					t.Errorf("%s: %d %v, %d bytes", path, r.status, r.err, len(r.body))
				}
			}
		})
	}
	wg.Wait()
}
