package broker

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/filestamp"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// TestListByName lists KEKs of which some can't be unsealed: copilot does not try for
// callers that may not use them.
func TestListByName(t *testing.T) {
	t.Parallel()
	d := harness.StartPostgres(t)
	dir := harness.TempDir(t)
	socket := dir + "/copilot.sock"
	for _, kek := range []string{"team-a", "team-b", "team-c"} {
		harness.Output(t, harness.Command(t, "copilot", "keys", "create", "--dir", dir, "--database", d.URL(), kek))
	}
	d.Sql(t, `UPDATE copilot_keks SET record = '\x00' WHERE id <> 'team-a'`)
	policy := func(keks string) {
		t.Helper()
		harness.Write(t, dir+"/policy.new", "[[rule]]\nidentities = [\"uid:0\"]\nkeks = ["+keks+"]\nactions = [\"wrap\"]\n")
		if err := os.Rename(dir+"/policy.new", dir+"/policy.toml"); err != nil {
			t.Fatal(err)
		}
	}
	policy(`"team-a"`)
	p := harness.Start(t, dir, "copilot", exec.Command("copilot", "serve", "--dir", dir, "--database", d.URL(), "--policy", dir+"/policy.toml", "--listen", "unix://"+socket))
	harness.Await(t, "copilot", harness.Reachable(socket))
	// At its start, copilot looks in all records for keys to destroy.
	harness.Await(t, "the first sweep", func() error {
		if !strings.Contains(harness.Read(t, p.Log), "is damaged or was tampered with") {
			return fmt.Errorf("nothing in the log")
		}
		return nil
	})
	missing := func() int { return strings.Count(harness.Read(t, p.Log), "KEKs are missing from the list") }
	list := func() string {
		t.Helper()
		status, body := harness.RequestOverSocket(t, socket, "GET", "/api/v2/keks", "")
		if status != 200 || strings.Contains(body, "team-b") || strings.Contains(body, "team-c") {
			t.Errorf("%d %s", status, body)
		}
		return body
	}
	if body := list(); !strings.Contains(body, `"id":"team-a"`) || missing() != 0 {
		t.Errorf("%s; read damaged KEKs %d times", body, missing())
	}
	policy(`"nothing"`)
	harness.Await(t, "the new policy", func() error {
		if body := list(); body != "[]" {
			return fmt.Errorf("%s", body)
		}
		return nil
	})
	if missing() != 0 {
		t.Error("KEKs were read for somebody who may use none")
	}
	policy(`"team-*"`)
	harness.Await(t, "the last policy", func() error {
		if list(); missing() == 0 {
			return fmt.Errorf("no damaged KEK is reported")
		}
		return nil
	})
}

// TestPolicyWrittenInPlace writes the policy as editors do that truncate the file
// first, slowly, while a client goes on asking.
func TestPolicyWrittenInPlace(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	socket, name := dir+"/copilot.sock", dir+"/policy.toml"
	header := strings.Repeat("# This policy is written by a tool that is slow.\n", 4)
	const rule = "[[rule]]\nidentities = [\"uid:0\"]\nkeks = [\"%s\"]\nactions = [\"export\"]\n"
	harness.Write(t, name, fmt.Sprintf(rule, "team-a"))
	harness.Output(t, harness.Command(t, "copilot", "keys", "create", "--dir", dir, "team-a"))
	p := harness.Start(t, dir, "copilot", exec.Command("copilot", "serve", "--dir", dir, "--policy", name, "--listen", "unix://"+socket))
	harness.Await(t, "copilot", harness.Reachable(socket))

	allowed := func() error {
		if status, body := harness.RequestOverSocket(t, socket, "GET", "/api/v2/keks/team-a/key", ""); status != 200 {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	var asking sync.Mutex
	denied := 0
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
				asking.Lock()
				if allowed() != nil {
					denied++
				}
				asking.Unlock()
			}
		}
	}()
	// The rule is written in parts, with team-a at the end: a partial file is valid, and
	// denies it.
	parts := []string{header, fmt.Sprintf(rule, "team-b"), header, fmt.Sprintf(rule, "team-c"), fmt.Sprintf(rule, "team-a")}
	rounds := 0
	for tries := 0; rounds < 10 && tries < 50; tries++ {
		asking.Lock()
		before, longest := denied, time.Duration(0)
		asking.Unlock()
		f, err := os.OpenFile(name, os.O_WRONLY|os.O_TRUNC, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, part := range parts {
			began := time.Now()
			if _, err := f.WriteString(part); err != nil {
				t.Fatal(err)
			}
			time.Sleep(40 * time.Millisecond)
			longest = max(longest, time.Since(began))
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(filestamp.Settle)
		if longest < filestamp.Settle/2 {
			rounds++
			continue
		}
		// A busy machine held the writer up for so long that a part looked whole.
		harness.Await(t, "the whole policy", allowed)
		asking.Lock()
		denied = before
		asking.Unlock()
	}
	if rounds == 0 {
		t.Fatal("the writer was held up each time")
	}
	harness.Await(t, "the policy as it is now", func() error {
		if !strings.Contains(harness.Read(t, p.Log), "policy reloaded") {
			return fmt.Errorf("not read")
		}
		return nil
	})

	// A truncated file is not a policy.
	for _, text := range []string{"", header} {
		before := strings.Count(harness.Read(t, p.Log), "has no rules")
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		harness.Await(t, "the empty file is refused", func() error {
			if strings.Count(harness.Read(t, p.Log), "has no rules") == before {
				return fmt.Errorf("not yet")
			}
			return nil
		})
	}
	close(stop)
	<-stopped
	if denied > 0 {
		t.Errorf("%d requests were denied", denied)
	}
	harness.ExpectFailure(t, harness.Command(t, "copilot", "policy", "check", "--config", "/dev/null", "--policy", name), "has no rules", "deny = true")
}

// TestRequestsOfWebPagesAreRefused has a browser's requests made by curl.
func TestRequestsOfWebPagesAreRefused(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	address := loopbacktest.FreeAddress(t)
	harness.Output(t, harness.Command(t, "copilot", "keys", "create", "--dir", dir, "team-a"))
	harness.Start(t, dir, "copilot", exec.Command("copilot", "serve", "--dir", dir, "--insecure-loopback", "--listen", address))
	curl := func(args ...string) string {
		t.Helper()
		return harness.Output(t, harness.Command(t, "curl", append(args, "-s", "-o", filepath.Join(dir, "answer"), "-w", "%{http_code}", "http://"+address+"/api/v2/keks/team-a/key")...))
	}
	harness.Await(t, "copilot", func() error { return exec.Command("curl", "-sf", "http://"+address+"/healthz").Run() })
	for _, test := range []struct {
		want string
		args []string
	}{
		{"200", nil},
		{"200", []string{"-H", "Origin: http://" + address, "-H", "Sec-Fetch-Site: same-origin"}},
		{"403", []string{"-H", "Origin: https://evil.example"}},
		{"403", []string{"-H", "Sec-Fetch-Site: cross-site"}},
		{"403", []string{"-H", "Origin: null"}},
	} {
		if got := curl(test.args...); got != test.want {
			t.Errorf("%q: %s %s, want %s", test.args, got, harness.Read(t, filepath.Join(dir, "answer")), test.want)
		}
	}
}
