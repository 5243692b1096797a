package harness

import (
	"bytes"
	"context"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// Timeout is how long a test waits for what a quiet machine does in a second or
// less. It costs nothing where all is well, and a busy machine takes many times
// as long.
const Timeout = 2 * time.Minute

// Await waits until f succeeds.
func Await(t testing.TB, what string, f func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(Timeout); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

// Reachable and Listening try to connect to a unix socket and to HOST:PORT.
func Reachable(socket string) func() error { return connects("unix", socket) }

func Listening(address string) func() error { return connects("tcp", address) }

func connects(network, address string) func() error {
	return func() error {
		conn, err := net.Dial(network, address)
		if err == nil {
			conn.Close()
		}
		return err
	}
}

// Command returns a command that is killed with the test, or after five minutes.
func Command(t testing.TB, name string, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(cancel)
	return exec.CommandContext(ctx, name, args...)
}

// Output runs a command that has to succeed and returns its output.
func Output(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(cmd.Args, " "), err, out, stderr.Bytes())
	}
	return string(out)
}

// ContainerOutput runs a container by ctr or ctr-pilot, and returns what it writes. Both lose
// the output of a container that ends before they have opened its pipe, and
// succeed, so what writes nothing is run again.
func ContainerOutput(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	for range 10 {
		again := &exec.Cmd{Path: cmd.Path, Args: cmd.Args, Env: cmd.Env, Dir: cmd.Dir, SysProcAttr: cmd.SysProcAttr, Err: cmd.Err}
		if out := Output(t, again); out != "" {
			return out
		}
	}
	return ""
}

// ExpectFailure runs a command that has to fail and say each of want.
func ExpectFailure(t testing.TB, cmd *exec.Cmd, want ...string) string {
	t.Helper()
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Errorf("%s succeeded:\n%s", strings.Join(cmd.Args, " "), out)
	}
	said := strings.ReplaceAll(string(out), `\"`, `"`) // crictl quotes errors
	for _, w := range want {
		if !strings.Contains(said, w) {
			t.Errorf("%s: want %q in\n%s", strings.Join(cmd.Args, " "), w, out)
		}
	}
	return string(out)
}

// CombinedOutput runs a command that may fail and returns what it says.
func CombinedOutput(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	out, _ := cmd.CombinedOutput()
	return string(out)
}
