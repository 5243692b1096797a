package broker

import (
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestAnotherUsersAdminSocketIsRefused imports a KEK while another user's socket is in place of
// copilot's, and would get the key.
func TestAnotherUsersAdminSocketIsRefused(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	harness.StartBroker(t, dir, "team-a")
	key := harness.Write(t, dir+"/key", "0123456789abcdef0123456789abcdef")
	socket := filepath.Join(dir, "admin.sock")
	harness.Output(t, harness.Command(t, "copilot", "keys", "list", "--dir", dir))
	os.Remove(socket)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan int, 16)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			n, _ := conn.Read(make([]byte, 1024))
			got <- n
			conn.Close()
		}
	}()
	if err := os.Chown(socket, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"list"}, {"import", "--file", key, "team-b"}} {
		args = append([]string{"keys", args[0], "--dir", dir}, args[1:]...)
		harness.ExpectFailure(t, harness.Command(t, "copilot", args...), "admin socket", "belongs to user 65534", "remove it")
	}
	l.Close()
	for len(got) > 0 {
		if n := <-got; n > 0 {
			t.Errorf("it was sent %d bytes", n)
		}
	}
}

// TestWritableStoreDirectoryIsRefused starts copilot in a directory that everybody can write.
func TestWritableStoreDirectoryIsRefused(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	store := filepath.Join(dir, "store")
	harness.Output(t, harness.Command(t, "copilot", "keys", "create", "--dir", store, "team-a"))
	os.Chmod(store, 0o777)
	harness.ExpectFailure(t, harness.Command(t, "copilot", "serve", "--dir", store, "--listen", "unix://"+dir+"/s"), "others can write the store's directory "+store, "chmod go-w "+store)
	harness.Output(t, harness.Command(t, "chmod", "go-w", store))
	harness.Output(t, harness.Command(t, "copilot", "keys", "list", "--dir", store))
	os.Chown(filepath.Join(store, "master.key"), nobody, nobody)
	harness.ExpectFailure(t, harness.Command(t, "copilot", "keys", "list", "--dir", store), "master.key belongs to user 65534", "chown 0 ")
}
