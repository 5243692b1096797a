package broker

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestAuditLogRotatedWhileStopped moves the audit log away while copilot does not run, as
// logrotate does: no lines are missing, and its chain goes on in the new file. A file with
// lines cut off is no excuse.
func TestAuditLogRotatedWhileStopped(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		suffix string
		empty  bool // logrotate makes a new file (create)
		gzip   bool
		cut    bool
	}{
		"by number":             {suffix: ".1"},
		"by number, new file":   {suffix: ".1", empty: true},
		"by date":               {suffix: "-20261128"},
		"by number, compressed": {suffix: ".1", gzip: true},
		"by date, compressed":   {suffix: "-20261128", gzip: true, empty: true},
		"and cut off":           {suffix: ".1", cut: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := harness.TempDir(t)
			store, socket := dir+"/store", dir+"/copilot.sock"
			log := store + "/audit.log"
			harness.Output(t, harness.Command(t, "copilot", "keys", "create", "--dir", store, "team-a"))
			run := func() string {
				t.Helper()
				p := harness.Start(t, dir, "copilot", exec.Command("copilot", "serve", "--dir", store, "--listen", "unix://"+socket))
				harness.Await(t, "copilot", harness.Reachable(socket))
				for range 3 {
					if status, body := harness.RequestOverSocket(t, socket, "GET", "/api/v2/keks/team-a/key", ""); status != 200 {
						t.Fatalf("%d %s", status, body)
					}
				}
				_, metrics := harness.RequestOverSocket(t, store+"/admin.sock", "GET", "/metrics", "")
				p.Stop(t)
				return metrics
			}
			verify := func() *exec.Cmd { return harness.Command(t, "copilot", "audit", "verify", "--dir", store) }
			run()
			if test.cut {
				lines := strings.SplitAfter(harness.Read(t, log), "\n")
				harness.Write(t, log, strings.Join(lines[:len(lines)-2], ""))
			}
			if err := os.Rename(log, log+test.suffix); err != nil {
				t.Fatal(err)
			}
			if test.gzip {
				harness.Output(t, exec.Command("gzip", log+test.suffix))
			}
			if test.empty {
				harness.Write(t, log, "")
			}
			metrics := run()
			said := strings.Contains(harness.Read(t, dir+"/copilot.log"), "audit log: the lines of chain")
			if said != test.cut {
				t.Errorf("the log of the process has lines that are missing: %v", said)
			}
			losses := "copilot_audit_losses_total 0\n"
			if test.cut {
				losses = "copilot_audit_losses_total 1\n"
			}
			if !strings.Contains(metrics, losses) {
				t.Errorf("metrics without %q", losses)
			}
			if test.cut {
				harness.ExpectFailure(t, verify(), "PROBLEM: chain", "or its end, is missing")
				return
			}
			if first, _, _ := strings.Cut(harness.Read(t, log), "\n"); !strings.Contains(first, `"action":"continue"`) || !strings.Contains(first, "the one before was moved to "+log+test.suffix) {
				t.Errorf("the new file begins with %s", first)
			}
			out := harness.Output(t, verify())
			if !strings.Contains(out, "none changed or missing") || strings.Count(out, "\n") != 2 {
				t.Errorf("not one chain: %s", out)
			}
			// The next start finds the lines where they are.
			if metrics := run(); !strings.Contains(metrics, losses) {
				t.Errorf("metrics without %q after another start", losses)
			}
			harness.Output(t, verify())
		})
	}
}
