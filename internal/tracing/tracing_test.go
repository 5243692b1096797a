package tracing

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
	"github.com/ctrlplane/pilot/internal/tracing/tracetest"
)

// start starts tracing with variables, and puts everything back at the end.
func start(t *testing.T, variables map[string]string) (stop func(context.Context) error, err error) {
	t.Helper()
	for _, name := range []string{"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SDK_DISABLED",
		"OTEL_TRACES_EXPORTER", "OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_EXPORTER_OTLP_PROTOCOL"} {
		t.Setenv(name, variables[name])
	}
	t.Setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
	provider, propagator := otel.GetTracerProvider(), otel.GetTextMapPropagator()
	t.Cleanup(func() {
		otel.SetTracerProvider(provider)
		otel.SetTextMapPropagator(propagator)
	})
	otel.SetTextMapPropagator(propagation.NewCompositeTextMapPropagator())
	return Start(t.Context(), "pilot")
}

const parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

// TestJoin has a call come in over gRPC, and another go out over HTTP for it.
func TestJoin(t *testing.T) {
	collector := tracetest.Start(t)
	stop, err := start(t, map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": collector.URL, "OTEL_RESOURCE_ATTRIBUTES": "host.name=node-7"})
	if err != nil {
		t.Fatal(err)
	}
	header := http.Header{}
	intercept := UnaryServer()
	call := func(fails error) {
		ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs("traceparent", parent))
		intercept(ctx, nil, &grpc.UnaryServerInfo{FullMethod: "/keyprovider.KeyProviderService/WrapKey"}, func(ctx context.Context, _ any) (any, error) {
			otel.GetTextMapPropagator().Inject(ctx, propagation.HeaderCarrier(header))
			return nil, fails
		})
	}
	call(nil)
	call(status.Error(codes.NotFound, "no such KEK"))
	if err := stop(t.Context()); err != nil {
		t.Error(err)
	}
	spans := collector.Spans(t, 2)
	for i, s := range spans {
		if s.Service != "pilot" || s.Attributes["host.name"] != "node-7" || s.Name != "keyprovider.KeyProviderService/WrapKey" || s.Kind != tracepb.Span_SPAN_KIND_SERVER {
			t.Errorf("%+v", s)
		}
		if s.TraceID != "0af7651916cd43dd8448eb211c80319c" || s.Parent != "b7ad6b7169203331" {
			t.Errorf("it is not in the caller's trace: %+v", s)
		}
		if want := []string{"OK", "NotFound"}[i]; s.Attributes["rpc.response.status_code"] != want || (s.Status != "") != (want != "OK") {
			t.Errorf("want %s: %+v", want, s)
		}
	}
	if got, want := header.Get("traceparent"), "00-"+spans[1].TraceID+"-"+spans[1].SpanID+"-01"; got != want {
		t.Errorf("traceparent %s is passed on, want %s", got, want)
	}
}

func TestServiceName(t *testing.T) {
	collector := tracetest.Start(t)
	stop, err := start(t, map[string]string{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": collector.URL + "/v1/traces", "OTEL_SERVICE_NAME": "other"})
	if err != nil {
		t.Fatal(err)
	}
	defer stop(t.Context())
	_, span := otel.Tracer("").Start(t.Context(), "x")
	span.End()
	if s := collector.Spans(t, 1)[0]; s.Service != "other" {
		t.Errorf("%+v", s)
	}
}

// TestOff has no collector to send spans to. Spans still have a common trace ID, unless
// that is turned off too.
func TestOff(t *testing.T) {
	for name, test := range map[string]struct {
		variables map[string]string
		ids       bool
	}{
		"no collector": {nil, true},
		"no exporter":  {map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"}, true},
		"disabled":     {map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			stop, err := start(t, test.variables)
			if err != nil {
				t.Fatal(err)
			}
			header := http.Header{}
			ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs("traceparent", parent))
			UnaryServer()(ctx, nil, &grpc.UnaryServerInfo{FullMethod: "/a/b"}, func(ctx context.Context, _ any) (any, error) {
				otel.GetTextMapPropagator().Inject(ctx, propagation.HeaderCarrier(header))
				return nil, nil
			})
			if got := header.Get("traceparent"); strings.HasPrefix(got, parent[:36]) != test.ids {
				t.Errorf("traceparent %q is passed on", got)
			}
			if err := stop(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestRefused(t *testing.T) {
	for want, variables := range map[string]map[string]string{
		"OTEL_EXPORTER_OTLP_ENDPOINT is not a URL":        {"OTEL_EXPORTER_OTLP_ENDPOINT": "localhost:4318"},
		"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is not a URL": {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "unix:///SECRET"},
		"OTEL_EXPORTER_OTLP_PROTOCOL is grpc":             {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
	} {
		if _, err := start(t, variables); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "SECRET") {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

// buffer is one that is read while others write.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// TestBadCollector checks that calls don't notice a collector that is away,
// slow or broken, and that there is one warning.
func TestBadCollector(t *testing.T) {
	slow := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body) // or the server does not notice that the client is gone
		<-r.Context().Done()
	}))
	broken := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusForbidden)
		w.Write(bytes.Repeat([]byte("x"), 100000))
	}))
	t.Cleanup(slow.Close)
	t.Cleanup(broken.Close)
	for name, url := range map[string]string{"slow": slow.URL, "broken": broken.URL, "away": "http://user:SECRET@" + loopbacktest.FreeAddress(t)} {
		t.Run(name, func(t *testing.T) {
			log := &buffer{}
			logrus.SetOutput(log)
			defer logrus.SetOutput(os.Stderr)
			stop, err := start(t, map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_EXPORTER_OTLP_TIMEOUT": "60000"})
			if err != nil {
				t.Fatal(err)
			}
			intercept := UnaryServer()
			begin := time.Now()
			for range 5000 { // more than are kept
				if _, err := intercept(t.Context(), nil, &grpc.UnaryServerInfo{}, func(ctx context.Context, _ any) (any, error) {
					if !trace.SpanContextFromContext(ctx).IsValid() {
						return nil, errors.New("no span")
					}
					return nil, nil
				}); err != nil {
					t.Fatal(err)
				}
			}
			if took := time.Since(begin); took > 30*time.Second { // waiting for the slow one would take more than a minute
				t.Errorf("5000 calls took %s", took)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			begin = time.Now()
			stop(ctx)
			if took := time.Since(begin); took > 30*time.Second {
				t.Errorf("it took %s to stop", took)
			}
			said := log.String()
			if n := strings.Count(said, "traces not sent"); n > 1 || len(said) > 2000 || strings.Contains(said, "SECRET") {
				t.Errorf("%d warnings: %s", n, said)
			}
		})
	}
}
