package broker

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
)

// auditLine is what the test reads of a line of the audit log.
type auditLine struct {
	Action, KEK, Who, From, Verdict, Reason string
	Status                                  int
	Count                                   int64
	Time, Since                             time.Time
}

func auditLines(t testing.TB, name string) []auditLine {
	t.Helper()
	var all []auditLine
	for line := range strings.Lines(harness.Read(t, name)) {
		var l auditLine
		if err := json.Unmarshal([]byte(line), &l); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		if len(line) > 6000 {
			t.Errorf("a line of %d bytes: %.200s", len(line), line)
		}
		all = append(all, l)
	}
	return all
}

// TestRefusalsSummedUp has a client send many requests that are denied, among others that
// are allowed.
func TestRefusalsSummedUp(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	store, socket := dir+"/store", dir+"/copilot.sock"
	for _, kek := range []string{"mine", "theirs"} {
		harness.Output(t, harness.Command(t, "copilot", "keys", "create", "--dir", store, kek))
	}
	policy := harness.Write(t, dir+"/policy.toml", "[[rule]]\nidentities = [\"uid:0\"]\nkeks = [\"mine\"]\nactions = [\"export\", \"unwrap\"]\n"+
		"[[limit]]\nidentities = [\"uid:0\"]\nper-second = 100000\nburst = 100000\n")
	serve := func() *harness.Process {
		t.Helper()
		p := harness.Start(t, dir, "copilot", exec.Command("copilot", "serve", "--dir", store, "--policy", policy, "--listen", "unix://"+socket))
		harness.Await(t, "copilot", harness.Reachable(socket))
		return p
	}
	p := serve()
	client := http.Client{Timeout: harness.Timeout, Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	sent := make(map[int]int64)
	get := func(kek string) int {
		t.Helper()
		resp, err := client.Get("http://copilot/api/v2/keks/" + url.PathEscape(kek) + "/key")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		sent[resp.StatusCode]++
		return resp.StatusCode
	}
	before := len(auditLines(t, store+"/audit.log"))
	for i := range 3000 {
		get("theirs")
		if i%30 == 0 {
			get("mine")
		}
	}
	// Each with another name, of the greatest length, and with characters that JSON escapes.
	for i := range 500 {
		get(fmt.Sprintf("%d%s", i, strings.Repeat(`<&>"`, 2000)))
	}
	get("a\x01")
	get("a\x02")
	if sent[200] != 100 || sent[403] != 3502 {
		t.Fatalf("answers: %v", sent)
	}
	count := func() (lines int, allowed, denied int64) {
		for _, l := range auditLines(t, store+"/audit.log")[before:] {
			lines++
			switch {
			case l.Verdict == "allowed" && l.Count == 0:
				allowed++
			case l.Verdict == "denied" && l.Count == 0:
				denied++
			case l.Verdict == "denied":
				denied += l.Count
				if want := fmt.Sprintf("(denied %d more time", l.Count); !strings.Contains(l.Reason, want) || l.Since.IsZero() || l.Since.After(l.Time) || l.Who != "uid:0" || l.Status != 403 {
					t.Errorf("%+v", l)
				}
			default:
				t.Errorf("%+v", l)
			}
		}
		return lines, allowed, denied
	}
	if lines, allowed, _ := count(); allowed != 100 || lines > 100+60+128+20 {
		t.Errorf("%d lines, of which %d are of uses", lines, allowed)
	}
	// The burst is over.
	harness.Await(t, "it is summed up", func() error {
		if _, allowed, denied := count(); allowed != 100 || denied < 3000 {
			return fmt.Errorf("%d denied in the log", denied)
		}
		return nil
	})
	get("theirs")
	p.Stop(t)
	lines, allowed, denied := count()
	if allowed != sent[200] || denied != sent[403] {
		t.Errorf("the log has %d allowed and %d denied, and there were %v", allowed, denied, sent)
	}
	t.Logf("%d requests, %d lines, %d bytes", sent[200]+sent[403], lines, len(harness.Read(t, store+"/audit.log")))
	first := make(map[string]int)
	for _, l := range auditLines(t, store+"/audit.log")[before:] {
		if l.Count == 0 && l.Verdict == "denied" {
			first[l.KEK]++
		}
	}
	if sums := harness.Read(t, store+"/audit.log"); !regexp.MustCompile(`, for \d+ different KEKs, this one the last`).MatchString(sums) {
		t.Error("no line says how many KEKs were tried")
	}
	if first["theirs"] == 0 || first["a\x01"] != 0 || len(first) < 100 {
		t.Errorf("%d KEKs have a line", len(first))
	}
	harness.Output(t, harness.Command(t, "copilot", "audit", "verify", "--dir", store))

	// Occasional refusals each have a line.
	before = len(auditLines(t, store+"/audit.log"))
	p = serve()
	clear(sent)
	for range 20 {
		get("theirs")
	}
	for _, name := range []string{"a\x01", "a\x02", `a\x01`} {
		get(name)
	}
	p.Stop(t)
	names := make(map[string]int)
	for _, l := range auditLines(t, store+"/audit.log")[before:] {
		if l.Count != 0 {
			t.Errorf("summed up: %+v", l)
		}
		names[l.KEK]++
	}
	if names["theirs"] != 20 || names[`"a\x01"`] != 1 || names[`"a\x02"`] != 1 || names[`a\x01`] != 1 {
		t.Errorf("names in the log: %v", names)
	}
}
