package plugin

import (
	"bytes"
	"context"
	"testing"

	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"github.com/ctrlplane/pilot/processor"
)

// plainProvider wraps a layer key by leaving it as it is, and notes the trace
// of who has it unwrapped.
type plainProvider struct{ trace trace.TraceID }

func (p *plainProvider) WrapKey(_ context.Context, _ [][]byte, layerKey []byte) ([]byte, error) {
	return bytes.Clone(layerKey), nil
}

func (p *plainProvider) UnwrapKey(ctx context.Context, _ [][]byte, annotation []byte) ([]byte, error) {
	p.trace = trace.SpanContextFromContext(ctx).TraceID()
	return bytes.Clone(annotation), nil
}

// TestApplyTraced checks that the span of a layer says which it is, and that the
// key provider's are part of the same trace.
func TestApplyTraced(t *testing.T) {
	p := &plainProvider{}
	own := processor.Keys{Providers: map[string]processor.KeyProvider{"plain": p}}
	s := newStore(t)
	k := keys{to: processor.Recipients{Keys: own, Parameters: map[string][][]byte{"plain": {[]byte("x")}}}}
	desc := put(t, s, k, layerType, tarball(t, 5), unchanged)

	ended := tracetest.NewSpanRecorder()
	ctx, span := sdk.NewTracerProvider(sdk.WithSpanProcessor(ended)).Tracer("").Start(t.Context(), "Apply")
	mounts, _ := overlay(t)
	if _, err := New(s, nil, Config{Keys: own}).Apply(ctx, desc, mounts); err != nil {
		t.Fatal(err)
	}
	span.End()
	spans := ended.Ended()
	said := map[string]string{}
	for _, a := range spans[len(spans)-1].Attributes() {
		said[string(a.Key)] = a.Value.AsString()
	}
	if said["pilot.layer.digest"] != desc.Digest.String() || said["pilot.layer.media_type"] != desc.MediaType {
		t.Errorf("the span says %v", said)
	}
	if p.trace != span.SpanContext().TraceID() {
		t.Errorf("the key provider is in trace %s, the layer in %s", p.trace, span.SpanContext().TraceID())
	}
}
