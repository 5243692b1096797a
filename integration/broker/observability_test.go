package broker

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

const observability = "../../docs/observability/"

// TestAlerts has Prometheus' own program read the alert rules, and try each on
// series in which all is well, and on some in which it is not.
func TestAlerts(t *testing.T) {
	t.Parallel()
	harness.Output(t, harness.Command(t, "promtool", "check", "rules", observability+"alerts.yml"))
	harness.Output(t, harness.Command(t, "promtool", "test", "rules", observability+"alerts_test.yml"))
	tried := harness.Read(t, observability+"alerts_test.yml")
	for _, alert := range regexp.MustCompile(`alert: (\w+)`).FindAllStringSubmatch(harness.Read(t, observability+"alerts.yml"), -1) {
		if strings.Count(tried, "alertname: "+alert[1]+"\n")+strings.Count(tried, "alertname: "+alert[1]+"}") < 2 {
			t.Errorf("%s is not tried both ways", alert[1])
		}
	}
}

// TestDashboard has Prometheus' own parser read each query of the dashboard, and
// looks for the metrics that it shows.
func TestDashboard(t *testing.T) {
	t.Parallel()
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal([]byte(harness.Read(t, observability+"dashboard.json")), &dashboard); err != nil {
		t.Fatal(err)
	}
	rules := "groups:\n- name: dashboard\n  rules:\n"
	queries := 0
	metric := regexp.MustCompile(`\b(?:pilot|copilot)_[a-z_]+`)
	exposed := metricsInSource(t)
	for _, p := range dashboard.Panels {
		for _, target := range p.Targets {
			queries++
			expr := strings.NewReplacer("$__rate_interval", "5m", "$job", "pilot", "$instance", ".*").Replace(target.Expr)
			rules += fmt.Sprintf("  - record: query:%d\n    expr: %q\n", queries, expr)
			for _, name := range metric.FindAllString(expr, -1) {
				if !exposed[strings.TrimSuffix(name, "_bucket")] {
					t.Errorf("%s shows %s, which nothing exposes", p.Title, name)
				}
			}
		}
	}
	if queries < 20 {
		t.Fatalf("the dashboard has %d queries only", queries)
	}
	harness.Output(t, harness.Command(t, "promtool", "check", "rules", harness.Write(t, filepath.Join(harness.TempDir(t), "rules.yml"), rules)))
	for _, name := range metric.FindAllString(harness.Read(t, observability+"alerts.yml"), -1) {
		if !exposed[name] {
			t.Errorf("an alert uses %s, which nothing exposes", name)
		}
	}
}

// metricsInSource returns the names of pilot's and copilot's metrics: some are exposed
// only after something has happened.
func metricsInSource(t *testing.T) map[string]bool {
	t.Helper()
	names := make(map[string]bool)
	for _, dir := range []string{"cmd/pilot", "keyprovider", "mirror", "plugin", "copilot/server", "copilot/server/keyring"} {
		files, err := filepath.Glob("../../" + dir + "/*.go")
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range regexp.MustCompile(`(?:Name: |NewDesc\(|Certificates\()"((?:pilot|copilot)_[a-z_]+)"`).FindAllSubmatch(b, -1) {
				names[string(name[1])] = true
			}
		}
	}
	return names
}
