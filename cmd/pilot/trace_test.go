package main

import (
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	ocicryptpb "github.com/containers/ocicrypt/utils/keyprovider"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/ctrlplane/pilot/internal/tracing/tracetest"
)

// TestServeTraces follows a call from a client through pilot to the broker.
func TestServeTraces(t *testing.T) {
	t.Parallel()
	var passedOn atomic.Value
	broker := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		passedOn.Store(r.Header.Get("traceparent"))
		if strings.Contains(r.URL.Path, "nobody") {
			w.Header().Set("Content-Type", "application/problem+json")
			w.WriteHeader(http.StatusNotFound)
			w.Write([]byte(`{"type":"about:blank","title":"Not Found","status":404,"detail":"no such KEK","request":"0123456789abcdef"}`))
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Write([]byte(`{"id":"team-a","version":7,"key":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`))
	}))
	t.Cleanup(broker.Close)
	collector := tracetest.Start(t)
	socket := filepath.Join(t.TempDir(), "s")
	startServeIn(t, []string{"OTEL_EXPORTER_OTLP_ENDPOINT=" + collector.URL, "OTEL_BSP_SCHEDULE_DELAY=20"}, "unix://"+socket, "--broker", broker.URL)

	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx := metadata.AppendToOutgoingContext(t.Context(), "traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
	wrap := func(kek string) error {
		input := []byte(`{"op":"keywrap","keywrapparams":{"ec":{"Parameters":{"pilot":["` + kek + `"]}},"optsdata":"c2VjcmV0"}}`)
		_, err := ocicryptpb.NewKeyProviderServiceClient(conn).WrapKey(ctx, &ocicryptpb.KeyProviderKeyWrapProtocolInput{KeyProviderKeyWrapProtocolInput: input})
		return err
	}
	if err := wrap("dGVhbS1h"); err != nil { // team-a
		t.Fatal(err)
	}
	spans := collector.Spans(t, 2)
	asked, answered := spans[0], spans[1] // as they ended
	if asked.Kind != tracepb.Span_SPAN_KIND_CLIENT || answered.Kind != tracepb.Span_SPAN_KIND_SERVER {
		t.Fatalf("%+v", spans)
	}
	if answered.TraceID != "0af7651916cd43dd8448eb211c80319c" || answered.Parent != "b7ad6b7169203331" || answered.Service != "pilot" {
		t.Errorf("the caller's trace goes on with %+v", answered)
	}
	if asked.TraceID != answered.TraceID || asked.Parent != answered.SpanID || asked.Name != "copilot key" || asked.Attributes["server.address"] != broker.URL {
		t.Errorf("pilot's trace goes on with %+v", asked)
	}
	if want := "00-" + asked.TraceID + "-" + asked.SpanID + "-01"; passedOn.Load() != want {
		t.Errorf("the broker gets %q, want %q", passedOn.Load(), want)
	}
	for key, want := range map[string]string{"pilot.kek.id": "team-a", "pilot.kek.version": "7", "pilot.method": "A256GCMKW", "rpc.response.status_code": "OK"} {
		if answered.Attributes[key] != want {
			t.Errorf("%s is %q, want %q", key, answered.Attributes[key], want)
		}
	}

	if err := wrap("bm9ib2R5"); err == nil { // nobody
		t.Fatal("it is wrapped for nobody")
	}
	for _, s := range collector.Spans(t, 4)[2:] {
		if !strings.Contains(s.Status, "no such KEK") {
			t.Errorf("it failed, and the span says %+v", s)
		}
	}
}
