package broker

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestConnectionsAreBounded opens more connections than an identity, or an address, may have.
func TestConnectionsAreBounded(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	socket := dir + "/copilot.sock"
	harness.Output(t, harness.Command(t, "copilot", "keys", "create", "--dir", dir, "team-a"))
	policy := harness.Write(t, dir+"/policy.toml", "[[rule]]\nidentities = [\"uid:0\"]\nkeks = [\"team-a\"]\nactions = [\"export\"]\n"+
		"[[limit]]\nidentities = [\"uid:0\"]\nper-second = 100000\nburst = 100000\nconnections = 10\n")
	harness.MoreFiles(t, 20000)
	harness.Start(t, dir, "copilot", exec.Command("copilot", "serve", "--dir", dir, "--policy", policy, "--listen", "unix://"+socket))
	harness.Await(t, "copilot", harness.Reachable(socket))
	dial := func() net.Conn {
		t.Helper()
		conn, err := net.Dial("unix", socket)
		for errors.Is(err, syscall.EAGAIN) { // so many wait to be accepted
			time.Sleep(time.Millisecond)
			conn, err = net.Dial("unix", socket)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	request := func(conn net.Conn) (int, string, bool) {
		t.Helper()
		fmt.Fprintf(conn, "GET /api/v2/keks/team-a/key HTTP/1.1\r\nHost: copilot\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			return 0, err.Error(), true
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(body), resp.Close
	}
	var open []net.Conn
	for range 10 {
		conn := dial()
		if status, body, _ := request(conn); status != 200 {
			t.Fatalf("%d %s", status, body)
		}
		open = append(open, conn)
	}
	if status, body, closed := request(dial()); status != 429 || !closed || !strings.Contains(body, "too many connections: 10 are open") {
		t.Errorf("the 11th: %d %s, closed: %t", status, body, closed)
	}
	if status, body, _ := request(open[3]); status != 200 {
		t.Errorf("one that is open: %d %s", status, body)
	}
	open[0].Close()
	harness.Await(t, "another one instead", func() error {
		if status, body, _ := request(dial()); status != 200 {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})
	// The admin socket has no limit.
	if status, body := harness.RequestOverSocket(t, dir+"/admin.sock", "GET", "/api/v2/keks/team-a", ""); status != 200 {
		t.Errorf("the admin: %d %s", status, body)
	}

	// Silent connections.
	var silent []net.Conn
	for range 5000 {
		silent = append(silent, dial())
	}
	refused := func() int {
		_, metrics := harness.RequestOverSocket(t, dir+"/admin.sock", "GET", "/metrics", "")
		_, after, _ := strings.Cut(metrics, "\ncopilot_connections_refused_total ")
		var n int
		fmt.Sscan(after, &n)
		return n
	}
	harness.Await(t, "some are refused", func() error {
		if n := refused(); n < 500 {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
	if status, body, _ := request(open[3]); status != 200 {
		t.Errorf("one that is open: %d %s", status, body)
	}
	for _, conn := range silent {
		conn.Close()
	}
	harness.Await(t, "room again", func() error {
		open[3].Close()
		if status, body, _ := request(dial()); status != 200 {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})
}
