package broker

import (
	"context"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	ocicryptpb "github.com/containers/ocicrypt/utils/keyprovider"
	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/tracing/tracetest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

// TestTraceFollowsLayerKey follows a layer key from the client that wraps it, through pilot, to copilot
// and its audit log.
func TestTraceFollowsLayerKey(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	collector := tracetest.Start(t)
	env := append(os.Environ(), "OTEL_EXPORTER_OTLP_ENDPOINT="+collector.URL, "OTEL_BSP_SCHEDULE_DELAY=20")
	harness.Output(t, harness.Command(t, "copilot", "keys", "create", "--dir", dir, "team-a"))
	broker := exec.Command("copilot", "serve", "--dir", dir, "--listen", "unix://"+dir+"/copilot.sock")
	broker.Env = env
	harness.Start(t, dir, "copilot", broker)
	harness.Await(t, "copilot", harness.Reachable(dir+"/copilot.sock"))
	provider := exec.Command("pilot", "serve", "--config", "/dev/null", "--broker", "unix://"+dir+"/copilot.sock", "--listen", "unix://"+dir+"/keyprovider.sock", "--diff-listen", "off")
	provider.Env = env
	harness.Start(t, dir, "pilot", provider)
	harness.Await(t, "pilot", harness.Reachable(dir+"/keyprovider.sock"))

	const trace = "0af7651916cd43dd8448eb211c80319c"
	wrapOver(t, metadata.AppendToOutgoingContext(t.Context(), "traceparent", "00-"+trace+"-b7ad6b7169203331-01"), dir+"/keyprovider.sock")
	byID := make(map[string]tracetest.Span)
	var last tracetest.Span
	for _, s := range collector.Spans(t, 3) {
		if s.TraceID != trace {
			continue
		}
		byID[s.SpanID] = s
		if s.Service == "copilot" {
			last = s
		}
	}
	var path []string
	for s := last; s.SpanID != ""; s = byID[s.Parent] {
		path = append(path, s.Service)
	}
	if got := strings.Join(path, " "); got != "copilot pilot pilot" || last.Attributes["copilot.kek"] != "team-a" {
		t.Errorf("the trace goes from %q: %+v", got, byID)
	}
	if log := harness.Read(t, dir+"/audit.log"); !strings.Contains(log, `"trace":"`+trace+`"`) {
		t.Errorf("the audit log lacks the trace:\n%s", log)
	}
}

// TestLogsShareIDWithoutCollector has no collector: the logs still show what belongs together.
func TestLogsShareIDWithoutCollector(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	_, url := harness.StartBroker(t, dir, "team-a")
	provider, _ := harness.StartPilot(t, dir+"/pilot", url, "--log-level", "debug")
	wrapOver(t, t.Context(), dir+"/pilot/keyprovider.sock")
	id := regexp.MustCompile(`trace=([0-9a-f]{32})`).FindStringSubmatch(harness.Read(t, provider.Log))
	if id == nil {
		t.Fatalf("pilot's log has no trace: %s", harness.Read(t, provider.Log))
	}
	if log := harness.Read(t, dir+"/audit.log"); !strings.Contains(log, `"trace":"`+id[1]+`"`) {
		t.Errorf("the audit log lacks the trace %s:\n%s", id[1], log)
	}
}

// wrapOver has the key provider on a socket wrap a layer key with the KEK team-a.
func wrapOver(t *testing.T, ctx context.Context, socket string) {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	input := []byte(`{"op":"keywrap","keywrapparams":{"ec":{"Parameters":{"pilot":["dGVhbS1h"]}},"optsdata":"c2VjcmV0"}}`)
	if _, err := ocicryptpb.NewKeyProviderServiceClient(conn).WrapKey(ctx, &ocicryptpb.KeyProviderKeyWrapProtocolInput{KeyProviderKeyWrapProtocolInput: input}); err != nil {
		t.Fatal(err)
	}
}
