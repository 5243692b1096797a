package harness

import (
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// StartRegistry starts docker-registry 2.8 and returns its address and its storage.
func StartRegistry(t testing.TB, dir string) (address, storage string) {
	t.Helper()
	return startRegistry(t, dir, "docker-registry")
}

// StartDistribution starts distribution 3, as StartRegistry does. It has no referrers API
// either, but its answers differ.
func StartDistribution(t testing.TB, dir string) (address, storage string) {
	t.Helper()
	return startRegistry(t, dir, "distribution")
}

func startRegistry(t testing.TB, dir, program string) (address, storage string) {
	t.Helper()
	storage = filepath.Join(dir, program)
	for range 10 {
		address = loopbacktest.FreeAddress(t)
		conf := Write(t, filepath.Join(dir, program+".yml"), fmt.Sprintf(
			"version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: '%s'}\n", storage, address))
		p := Start(t, dir, program, exec.Command(program, "serve", conf))
		for range Timeout / (50 * time.Millisecond) {
			conn, err := net.Dial("tcp", address)
			if err == nil {
				conn.Close()
				return address, storage
			}
			select {
			case <-p.Done: // another process took the port
			case <-time.After(50 * time.Millisecond):
				continue
			}
			break
		}
	}
	t.Fatalf("%s does not start", program)
	return "", ""
}
