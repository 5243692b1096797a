// Package tracetest is an OpenTelemetry collector for tests.
package tracetest

import (
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
)

// Span is a span as it was sent, with its ids in hexadecimal.
type Span struct {
	Service, Name           string
	TraceID, SpanID, Parent string
	Kind                    tracepb.Span_SpanKind
	Status                  string            // of an error, or empty
	Attributes              map[string]string // and those of its resource
	Events                  []string
}

// Collector takes spans by OTLP over HTTP at URL.
type Collector struct {
	URL string

	mu    sync.Mutex
	spans []Span
}

// Start starts a collector, which ends with the test.
func Start(t testing.TB) *Collector {
	t.Helper()
	c := &Collector{}
	s := httptest.NewServer(c)
	t.Cleanup(s.Close)
	c.URL = s.URL
	return c
}

// ServeHTTP answers an export request.
func (c *Collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(r.Body)
	var in collectorpb.ExportTraceServiceRequest
	if err != nil || r.URL.Path != "/v1/traces" || proto.Unmarshal(b, &in) != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, resource := range in.GetResourceSpans() {
		for _, scope := range resource.GetScopeSpans() {
			for _, span := range scope.GetSpans() {
				c.spans = append(c.spans, newSpan(resource, span))
			}
		}
	}
	w.Header().Set("Content-Type", "application/x-protobuf")
}

func newSpan(resource *tracepb.ResourceSpans, in *tracepb.Span) Span {
	s := Span{
		Name: in.GetName(), Kind: in.GetKind(),
		TraceID: hex.EncodeToString(in.GetTraceId()), SpanID: hex.EncodeToString(in.GetSpanId()), Parent: hex.EncodeToString(in.GetParentSpanId()),
		Attributes: map[string]string{},
	}
	for _, a := range append(resource.GetResource().GetAttributes(), in.GetAttributes()...) {
		s.Attributes[a.GetKey()] = a.GetValue().GetStringValue()
		if n := a.GetValue().GetIntValue(); n != 0 {
			s.Attributes[a.GetKey()] = fmt.Sprint(n)
		}
	}
	s.Service = s.Attributes["service.name"]
	for _, e := range in.GetEvents() {
		s.Events = append(s.Events, e.GetName())
	}
	if in.GetStatus().GetCode() == tracepb.Status_STATUS_CODE_ERROR {
		s.Status = in.GetStatus().GetMessage()
	}
	return s
}

// Spans waits until there are n spans, and returns all that there are.
func (c *Collector) Spans(t testing.TB, n int) []Span {
	t.Helper()
	for range 6000 { // a minute
		c.mu.Lock()
		spans := append([]Span(nil), c.spans...)
		c.mu.Unlock()
		if len(spans) >= n {
			return spans
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%d spans came, not %d: %+v", len(c.spans), n, c.spans)
	return nil
}
