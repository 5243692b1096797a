package copilot_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/copilot"
	client "github.com/ctrlplane/pilot/keyprovider/copilot"
)

// serve runs a broker on a store, until the test ends, and returns the address
// of its socket.
func serve(t *testing.T, dir string, conf copilot.Config) string {
	t.Helper()
	socket := filepath.Join(dir, "s")
	// It is opened last: once it answers, the others in conf do too.
	conf.Dir, conf.Listen = dir, append(conf.Listen, "unix://"+socket)
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- copilot.Serve(ctx, conf) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	for range 200 {
		if conn, err := net.Dial("unix", socket); err == nil {
			conn.Close()
			return "unix://" + socket
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("the broker does not start")
	return ""
}

func open(t *testing.T, dir string) copilot.Keys {
	t.Helper()
	keys, err := copilot.OpenKeys(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

// request makes a request to a unix socket.
func request(t *testing.T, url, method, path, body string) (int, string) {
	t.Helper()
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) {
		return net.Dial("unix", strings.TrimPrefix(url, "unix://"))
	}}}
	req, err := http.NewRequest(method, "http://broker"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// TestClient asks a real broker for what it was given.
func TestClient(t *testing.T) {
	dir := t.TempDir()
	key := []byte("0123456789abcdef0123456789abcdef")
	keys := open(t, dir)
	for id, k := range map[string][]byte{"team-a": key, "team/b": nil, "short": key[:16]} {
		if _, err := keys.Create(id, k); err != nil {
			t.Fatal(err)
		}
	}
	if err := keys.Close(); err != nil {
		t.Fatal(err)
	}
	url := serve(t, dir, copilot.Config{})
	c, err := client.New(client.Config{URL: url, Timeout: 2 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	if kek, err := c.KEK(ctx, "team-a", 0); err != nil || kek.Version != 1 || !bytes.Equal(kek.Key, key) {
		t.Errorf("got %d bytes of version %d, %v", len(kek.Key), kek.Version, err)
	}
	// While it serves, keys are managed through it.
	admin := open(t, dir)
	defer admin.Close()
	if info, err := admin.Rotate("team-a"); err != nil || info.Version != 2 {
		t.Errorf("rotate: %+v, %v", info, err)
	}
	if kek, err := c.KEK(ctx, "team-a", 0); err != nil || kek.Version != 2 || bytes.Equal(kek.Key, key) {
		t.Errorf("after rotation: version %d, %v", kek.Version, err)
	}
	if kek, err := c.KEK(ctx, "team-a", 1); err != nil || !bytes.Equal(kek.Key, key) {
		t.Errorf("the old version: %v", err)
	}
	for id, version := range map[string]int{"nobody": 0, "team-a": 3, "..": 0, strings.Repeat("x", 5000): 0, "eyJr/+==": 0} {
		if _, err := c.KEK(ctx, id, version); !errors.Is(err, client.ErrNotFound) && id != ".." || err == nil {
			t.Errorf("KEK %.20q version %d: %v", id, version, err)
		}
	}

	version, wrapped, err := c.Wrap(ctx, "team/b", []byte("secret"))
	if err != nil || version != 1 {
		t.Fatalf("wrap: version %d, %v", version, err)
	}
	if got, err := c.Unwrap(ctx, "team/b", version, wrapped); err != nil || string(got) != "secret" {
		t.Errorf("unwrap: %q, %v", got, err)
	}
	if _, err := c.Unwrap(ctx, "team-a", version, wrapped); err == nil {
		t.Error("another KEK unwraps it")
	}
	wrapped[len(wrapped)-1] ^= 1
	if _, err := c.Unwrap(ctx, "team/b", version, wrapped); err == nil {
		t.Error("it unwraps although it was changed")
	}
	if _, _, err := c.Wrap(ctx, "short", []byte("secret")); err == nil {
		t.Error("a KEK of 16 bytes wraps")
	}

	// The original's API.
	if status, body := request(t, url, "GET", "/api/v1/key/team%2Fb", ""); status != 200 || len(body) != 32 {
		t.Errorf("v1: %d, %d bytes", status, len(body))
	}
	if status, _ := request(t, url, "GET", "/api/v1/key/nobody", ""); status != 404 {
		t.Errorf("v1, unknown: %d", status)
	}
	for _, test := range []struct {
		method, path, body string
		status             int
	}{
		{"GET", "/api/v2/keks", "", 404},                       // for the admin socket only
		{"POST", "/api/v2/keks", `{"id":"evil"}`, 404},         //
		{"POST", "/api/v2/keks/team-a/rotate", "", 404},        //
		{"DELETE", "/api/v2/keks/team-a", "", 404},             //
		{"GET", "/api/v2/keks/team-a/key?version=x", "", 400},  //
		{"GET", "/api/v2/keks/team-a/key?version=-1", "", 400}, //
		{"POST", "/api/v2/keks/team-a/wrap", `{}`, 400},
		{"POST", "/api/v2/keks/team-a/wrap", `{"plaintext":"AA==","more":1}`, 400},
		{"POST", "/api/v2/keks/team-a/wrap", `{"plaintext":"AA=="} x`, 400},
		{"POST", "/api/v2/keks/team-a/wrap", strings.Repeat("x", 200<<10), 400},
		{"POST", "/api/v2/keks/team-a/wrap", `{"plaintext":"` + strings.Repeat("A", 200<<10) + `"}`, 413},
		{"POST", "/api/v2/keks/team-a/unwrap", `{"version":1,"wrappedKey":"AAAA"}`, 400},
		{"GET", "/", "", 404},
	} {
		status, body := request(t, url, test.method, test.path, test.body)
		var problem struct{ Status int }
		if json.Unmarshal([]byte(body), &problem); status != test.status || problem.Status != status {
			t.Errorf("%s %s: %d %s, want %d", test.method, test.path, status, body, test.status)
		}
	}

	// Everything is in the audit log, and no key.
	log, err := os.ReadFile(filepath.Join(dir, "audit.log"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"action":"import","kek":"team-a","version":1`, `"action":"rotate"`, `"action":"export","kek":"nobody"`, `"verdict":"denied"`, `"action":"unwrap"`, `"action":"other"`, `"who":"uid:0"`} {
		if os.Getuid() == 0 && !strings.Contains(string(log), want) {
			t.Errorf("the audit log lacks %s", want)
		}
	}
	if bytes.Contains(log, key) || bytes.Contains(log, []byte("MDEyMzQ1Njc4OWFiY2RlZj")) {
		t.Error("a key is in the audit log")
	}
	for line := range strings.Lines(string(log)) {
		if !json.Valid([]byte(line)) || len(line) > 4096 {
			t.Errorf("audit log: %.200s", line)
		}
	}
	for _, name := range []string{"keks.db", "master.key", "audit.log", "admin.sock", "s"} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
}

// TestNoAudit checks that a request which can't be audited is refused.
func TestNoAudit(t *testing.T) {
	dir := t.TempDir()
	keys := open(t, dir)
	if _, err := keys.Create("team-a", nil); err != nil {
		t.Fatal(err)
	}
	keys.Close()
	url := serve(t, dir, copilot.Config{AuditLog: "/dev/full"})
	if status, body := request(t, url, "GET", "/api/v1/key/team-a", ""); status != 503 || len(body) == 32 {
		t.Errorf("%d, %q", status, body)
	}
}

func TestStore(t *testing.T) {
	dir := t.TempDir()
	s, err := copilot.OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"", ".", "..", "/a", "a//b", "a/../b", "a b", "é", "-a", strings.Repeat("a", 129)} {
		if _, err := s.Create(id, nil, nil); !errors.Is(err, copilot.ErrInput) {
			t.Errorf("create %q: %v", id, err)
		}
	}
	for _, size := range []int{0, 1, 15, 31, 33, 64} {
		if _, err := s.Create("sized", make([]byte, size), nil); !errors.Is(err, copilot.ErrInput) {
			t.Errorf("import %d bytes: %v", size, err)
		}
	}
	if _, err := s.Create("a", nil, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create("a", nil, nil); !errors.Is(err, copilot.ErrExists) {
		t.Errorf("create again: %v", err)
	}
	if _, err := s.Rotate("b", nil); !errors.Is(err, copilot.ErrNotFound) {
		t.Errorf("rotate what is not there: %v", err)
	}
	if err := s.Delete("b", nil); !errors.Is(err, copilot.ErrNotFound) {
		t.Errorf("delete what is not there: %v", err)
	}
	key, _, err := s.Key("a", 0)
	if err != nil || len(key) != copilot.KeySize {
		t.Fatalf("%d bytes, %v", len(key), err)
	}
	s.Close()
	db, err := os.ReadFile(filepath.Join(dir, "keks.db"))
	if err != nil || bytes.Contains(db, key) {
		t.Errorf("the key is in the file as it is (%v)", err)
	}

	// The same key after opening again, and after no other master key.
	if s, err = copilot.OpenStore(dir); err != nil {
		t.Fatal(err)
	}
	if again, _, err := s.Key("a", 1); err != nil || !bytes.Equal(again, key) {
		t.Errorf("another key after opening again: %v", err)
	}
	s.Close()
	master := filepath.Join(dir, "master.key")
	good, err := os.ReadFile(master)
	if err != nil {
		t.Fatal(err)
	}
	refused := func(want string) {
		t.Helper()
		if s, err := copilot.OpenStore(dir); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
			if s != nil {
				s.Close()
			}
		}
	}
	os.Rename(master, master+".away")
	refused("the master key is missing")
	os.WriteFile(master, bytes.Repeat([]byte{1}, 32), 0o600)
	refused("not the one that the KEKs are sealed with")
	os.WriteFile(master, good[:31], 0o600)
	refused("31 bytes")
	os.WriteFile(master, good, 0o600)
	os.Chmod(master, 0o644)
	refused("can be read by others")
	os.Remove(master)
	credentials := t.TempDir()
	os.WriteFile(filepath.Join(credentials, "copilot-master-key"), good, 0o440)
	t.Setenv("CREDENTIALS_DIRECTORY", credentials)
	if s, err = copilot.OpenStore(dir); err != nil {
		t.Fatalf("with systemd's credential: %v", err)
	}
	s.Close()

	// A changed byte is found.
	i := bytes.Index(db, []byte(`"sealed":"`)) + 20
	db[i] ^= 1
	if err := os.WriteFile(filepath.Join(dir, "keks.db"), db, 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err = copilot.OpenStore(dir); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, _, err := s.Key("a", 0); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("a changed key: %v", err)
	}
}

func TestRefusedAddresses(t *testing.T) {
	for address, want := range map[string]string{
		"0.0.0.0:1": "other machines reach this", "[::]:1": "other machines", "example.com:1": "other machines",
		"127.0.0.1:1": "every user of this machine", "unix://relative": "absolute path", "nonsense": "neither",
	} {
		err := copilot.Serve(t.Context(), copilot.Config{Dir: t.TempDir(), Listen: []string{address}})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", address, err, want)
		}
	}
}
