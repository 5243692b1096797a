// Package traceid has the ID by which a request is found in all logs.
package traceid

import (
	"context"

	"go.opentelemetry.io/otel/trace"
)

// Of returns the ID of the trace that ctx belongs to, in 32 hexadecimal digits, or "".
func Of(ctx context.Context) string {
	if s := trace.SpanContextFromContext(ctx); s.HasTraceID() {
		return s.TraceID().String()
	}
	return ""
}
