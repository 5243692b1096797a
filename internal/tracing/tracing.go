// Package tracing sends a program's traces to an OpenTelemetry collector, if
// the program's environment names one.
package tracing

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdk "go.opentelemetry.io/otel/sdk/trace"
)

// Start sends spans by OTLP over HTTP to the collector that
// OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT names, and passes
// trace contexts on as W3C's traceparent. service is the program's name, unless
// OTEL_SERVICE_NAME is set. The other variables of
// https://opentelemetry.io/docs/specs/otel/protocol/exporter/ and of the SDK work too.
//
// If neither is set, or OTEL_TRACES_EXPORTER is none, nothing is sent, but requests
// still have trace ids, which are in the logs. They have none if OTEL_SDK_DISABLED is
// true.
//
// A collector that is down does not slow requests: spans that it does not accept are
// dropped, with a warning once a minute. stop sends what is left, until its context is
// done.
func Start(ctx context.Context, service string) (stop func(context.Context) error, err error) {
	endpoint, err := collector()
	if err != nil {
		return nil, err
	}
	if os.Getenv("OTEL_SDK_DISABLED") == "true" {
		return func(context.Context) error { return nil }, nil
	}
	otel.SetTextMapPropagator(propagation.TraceContext{})
	if endpoint == "" {
		otel.SetTracerProvider(idProvider{})
		return func(context.Context) error { return nil }, nil
	}
	self, err := resource.New(ctx,
		resource.WithTelemetrySDK(),
		resource.WithAttributes(attribute.String("service.name", service)),
		resource.WithFromEnv())
	if err != nil {
		return nil, fmt.Errorf("OTEL_RESOURCE_ATTRIBUTES: %w", err)
	}
	exporter, err := otlptracehttp.New(ctx)
	if err != nil {
		return nil, fmt.Errorf("traces for %s: %w", endpoint, err)
	}
	provider := sdk.NewTracerProvider(sdk.WithBatcher(exporter), sdk.WithResource(self))
	otel.SetErrorHandler(&failures{collector: endpoint})
	otel.SetTracerProvider(provider)
	return provider.Shutdown, nil
}

// collector returns the URL of the collector, without its password, or "" if there is
// none.
func collector() (string, error) {
	if os.Getenv("OTEL_TRACES_EXPORTER") == "none" {
		return "", nil
	}
	name, value := first("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
	if value == "" {
		return "", nil
	}
	u, err := url.Parse(value)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return "", fmt.Errorf("%s is not a URL such as http://localhost:4318", name)
	}
	if name, protocol := first("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"); protocol == "grpc" {
		return "", fmt.Errorf("%s is grpc: traces go over HTTP only, to a collector's port 4318", name)
	}
	return u.Redacted(), nil
}

// first returns the first variable that is set.
func first(names ...string) (name, value string) {
	for _, name = range names {
		if value = os.Getenv(name); value != "" {
			break
		}
	}
	return name, value
}

// warnInterval is the time between two warnings that spans are dropped.
const warnInterval = time.Minute

// failures logs that traces can't be sent, once every warnInterval.
type failures struct {
	collector string

	mu     sync.Mutex
	warned time.Time
}

// Handle implements [otel.ErrorHandler].
func (f *failures) Handle(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if time.Since(f.warned) < warnInterval {
		return
	}
	f.warned = time.Now()
	logrus.WithFields(logrus.Fields{"collector": f.collector, "error": fmt.Sprintf("%.300s", err)}).Warn("traces not sent")
}
