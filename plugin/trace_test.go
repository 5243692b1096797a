package plugin

import (
	"context"
	"encoding/json"
	"testing"

	"github.com/containers/ocicrypt/config"
	ocicrypt "github.com/containers/ocicrypt/keywrap/keyprovider"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"github.com/ctrlplane/pilot/processor"
)

// plainProvider wraps a layer key by leaving it as it is, and notes the trace
// of who has it unwrapped.
type plainProvider struct{ trace trace.TraceID }

func (p *plainProvider) WrapKey(_ context.Context, input []byte) ([]byte, error) {
	var in ocicrypt.KeyProviderKeyWrapProtocolInput
	if err := json.Unmarshal(input, &in); err != nil {
		return nil, err
	}
	return json.Marshal(ocicrypt.KeyProviderKeyWrapProtocolOutput{KeyWrapResults: ocicrypt.KeyWrapResults{Annotation: in.KeyWrapParams.OptsData}})
}

func (p *plainProvider) UnwrapKey(ctx context.Context, input []byte) ([]byte, error) {
	p.trace = trace.SpanContextFromContext(ctx).TraceID()
	var in ocicrypt.KeyProviderKeyWrapProtocolInput
	if err := json.Unmarshal(input, &in); err != nil {
		return nil, err
	}
	return json.Marshal(ocicrypt.KeyProviderKeyWrapProtocolOutput{KeyUnwrapResults: ocicrypt.KeyUnwrapResults{OptsData: in.KeyUnwrapParams.Annotation}})
}

// TestApplyTraced checks that the span of a layer says which it is, and that the
// key provider's are part of the same trace.
func TestApplyTraced(t *testing.T) {
	p := &plainProvider{}
	processor.RegisterKeyProvider("plain", p)
	s := newStore(t)
	k := keys{ec: &config.EncryptConfig{Parameters: map[string][][]byte{"plain": {[]byte("x")}}}}
	desc := put(t, s, k, layerType, tarball(t, 5), unchanged)

	ended := tracetest.NewSpanRecorder()
	ctx, span := sdk.NewTracerProvider(sdk.WithSpanProcessor(ended)).Tracer("").Start(t.Context(), "Apply")
	mounts, _ := overlay(t)
	if _, err := New(s, nil, Config{}).Apply(ctx, desc, mounts); err != nil {
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
