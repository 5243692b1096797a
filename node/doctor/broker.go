package doctor

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/containers/ocicrypt/config"
	protocol "github.com/containers/ocicrypt/keywrap/keyprovider"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/keyprovider"
	"github.com/ctrlplane/pilot/processor"
)

// broker wraps and unwraps a secret with each KEK.
func (e *examination) broker(ctx context.Context) Step {
	if e.ListenTLS {
		return skipped("the key provider at " + e.Listen + " requires a client certificate")
	}
	if len(e.KEKs) == 0 {
		return e.brokerWithoutKEK(ctx)
	}
	conn, err := dial(e.Listen)
	if err != nil {
		return failed(err.Error())
	}
	defer conn.Close()
	// A broker that is down makes each KEK wait, so try all at once.
	steps := make([]Step, len(e.KEKs))
	var wg sync.WaitGroup
	var away error
	wg.Go(func() { away = e.Brokers.Check(ctx) })
	for i, kek := range e.KEKs {
		wg.Go(func() { steps[i] = e.tryKEK(ctx, kek, providerAt{conn, e.ProviderNames[0]}) })
	}
	wg.Wait()

	var works, untried, broken, fix []string
	for i, step := range steps {
		switch step.Result {
		case OK:
			works = append(works, fmt.Sprintf("%q", e.KEKs[i]))
			if e.kek == "" {
				e.kek = e.KEKs[i]
			}
		case Skipped:
			untried = append(untried, fmt.Sprintf("%q", e.KEKs[i]))
		default:
			broken = append(broken, step.Detail)
			fix = append(fix, step.Fix...)
		}
	}
	if len(broken) > 0 {
		return failed(strings.Join(broken, "; "), unique(fix)...)
	}
	var details []string
	if len(works) > 0 {
		details = append(details, "wraps and unwraps with KEK "+strings.Join(works, ", "))
	}
	if len(untried) > 0 {
		details = append(details, fmt.Sprintf("may unwrap but not wrap with KEK %s, so it was not tried: pull an image", strings.Join(untried, ", ")))
	}
	if away != nil { // one of several, or nothing would work
		details = append(details, fmt.Sprintf("but %s", away))
	}
	detail := strings.Join(details, "; ")
	if len(works) == 0 {
		return skipped(detail)
	}
	return passed(detail)
}

// brokerWithoutKEK checks what it can. A node that uses private keys only has no broker that is
// set.
func (e *examination) brokerWithoutKEK(ctx context.Context) Step {
	const name = "no KEK to try: name one that this node uses with --kek"
	if !slices.ContainsFunc(e.BrokerURLs, func(u string) bool { return strings.HasPrefix(u, "https:") }) {
		return skipped(name)
	}
	switch err := e.Brokers.Check(ctx); {
	case err == nil:
		return skipped("the broker answers; " + name)
	case len(e.BrokerURLs) > 1: // others may answer
		return Step{Result: Warning, Detail: fmt.Sprintf("%s; %s", err, name), Fix: e.brokerFix("KEK", err)}
	default:
		return failed(err.Error(), e.brokerFix("KEK", err)...)
	}
}

// tryKEK wraps and unwraps with the key provider, and with the broker directly, without
// the key provider's cache. It is skipped for a KEK that the node may only unwrap with.
func (e *examination) tryKEK(ctx context.Context, kek string, daemon processor.KeyProvider) Step {
	direct := make(chan error, 1)
	go func() { direct <- roundTrip(ctx, kek, e.Provider) }()
	err := roundTrip(keyprovider.Probe(ctx), kek, daemon)
	directly := <-direct
	if err == nil && directly == nil {
		return passed("")
	}
	cause := directly
	if errors.Is(directly, client.ErrForbidden) && !e.Brokers.Original() {
		// To a request without a wrapped key the broker says whether this node may unwrap.
		_, cause = e.Brokers.Unwrap(ctx, kek, client.Wrapped{})
		if errors.Is(cause, client.ErrRejected) && (err == nil || status.Code(err) == codes.PermissionDenied) {
			return skipped("")
		}
	}
	if err == nil {
		return failed(fmt.Sprintf("pilot has KEK %q in its cache, but the broker does not release it now: %s", kek, directly), e.brokerFix(kek, cause)...)
	}
	detail := said(err)
	if !strings.Contains(detail, kek) {
		detail = fmt.Sprintf("KEK %q: %s", kek, detail)
	}
	if directly == nil {
		return failed(fmt.Sprintf("%s (the broker releases it with the settings in %s: pilot was started with others)", detail, e.Configuration), restartPilot...)
	}
	// The daemon has the same settings, and its error has lost its type.
	return failed(detail, e.brokerFix(kek, cause)...)
}

// roundTrip wraps a secret as a tool that encrypts does, and unwraps it as a
// pull does, which names no KEK.
func roundTrip(ctx context.Context, kek string, p processor.KeyProvider) error {
	secret := make([]byte, 32)
	rand.Read(secret) // never fails
	wrapped, err := p.WrapKey(ctx, [][]byte{[]byte(kek)}, secret)
	if err != nil {
		return err
	}
	unwrapped, err := p.UnwrapKey(ctx, nil, wrapped)
	if err == nil && !bytes.Equal(unwrapped, secret) {
		err = errors.New("the unwrapped secret is not the one that was wrapped")
	}
	return err
}

// providerAt is the key provider of that name at the other end of a connection. Its errors
// have gRPC's status.
type providerAt struct {
	conn *grpc.ClientConn
	name string
}

func (p providerAt) WrapKey(ctx context.Context, params [][]byte, layerKey []byte) ([]byte, error) {
	out, err := askFor(ctx, wrapAt(p.conn), protocol.KeyProviderKeyWrapProtocolInput{
		Operation: protocol.OpKeyWrap,
		KeyWrapParams: protocol.KeyWrapParams{
			Ec:       &config.EncryptConfig{Parameters: map[string][][]byte{p.name: params}},
			OptsData: layerKey,
		},
	})
	return out.KeyWrapResults.Annotation, err
}

func (p providerAt) UnwrapKey(ctx context.Context, _ [][]byte, annotation []byte) ([]byte, error) {
	out, err := askFor(ctx, unwrapAt(p.conn), protocol.KeyProviderKeyWrapProtocolInput{
		Operation: protocol.OpKeyUnwrap,
		KeyUnwrapParams: protocol.KeyUnwrapParams{
			Dc:         &config.DecryptConfig{},
			Annotation: annotation,
		},
	})
	return out.KeyUnwrapResults.OptsData, err
}

func askFor(ctx context.Context, f ask, in protocol.KeyProviderKeyWrapProtocolInput) (out protocol.KeyProviderKeyWrapProtocolOutput, err error) {
	b, err := json.Marshal(in)
	if err != nil {
		return out, err
	}
	answer, err := f(ctx, b)
	if err != nil {
		return out, err
	}
	if json.Unmarshal(answer, &out) != nil {
		err = errors.New("the response is not JSON of the key provider protocol")
	}
	return out, err
}

// unique returns list without duplicates, in its order.
func unique(list []string) (out []string) {
	seen := map[string]bool{}
	for _, s := range list {
		if !seen[s] {
			out = append(out, s)
		}
		seen[s] = true
	}
	return out
}
