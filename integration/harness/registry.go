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

// StartRegistry starts a registry and returns its address and its storage.
func StartRegistry(t testing.TB, dir string) (address, storage string) {
	t.Helper()
	storage = filepath.Join(dir, "registry")
	for range 10 {
		address = loopbacktest.FreeAddress(t)
		conf := Write(t, filepath.Join(dir, "registry.yml"), fmt.Sprintf(
			"version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: '%s'}\n", storage, address))
		p := Start(t, dir, "registry", exec.Command("docker-registry", "serve", conf))
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
	t.Fatal("the registry does not start")
	return "", ""
}
