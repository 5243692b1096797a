package doctor

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/containers/ocicrypt/config"
	protocol "github.com/containers/ocicrypt/keywrap/keyprovider"

	"github.com/ctrlplane/pilot/keyprovider"
)

// broker wraps and unwraps a secret with each KEK.
func (e *examination) broker(ctx context.Context) Step {
	if e.ListenTLS {
		return skipped("the key provider at " + e.Listen + " requires a client certificate")
	}
	if len(e.KEKs) == 0 {
		return skipped("no KEK to try: name one that this node uses with --kek")
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
		wg.Go(func() { steps[i] = e.tryKEK(ctx, kek, wrapAt(conn), unwrapAt(conn)) })
	}
	wg.Wait()

	var works, broken, fix []string
	for i, step := range steps {
		if step.Result == OK {
			works = append(works, fmt.Sprintf("%q", e.KEKs[i]))
			if e.kek == "" {
				e.kek = e.KEKs[i]
			}
			continue
		}
		broken = append(broken, step.Detail)
		fix = append(fix, step.Fix...)
	}
	if len(broken) > 0 {
		return failed(strings.Join(broken, "; "), unique(fix)...)
	}
	detail := "wraps and unwraps with KEK " + strings.Join(works, ", ")
	if away != nil { // one of several, or nothing would work
		detail += fmt.Sprintf("; but %s", away)
	}
	return passed(detail)
}

// tryKEK wraps and unwraps with the key provider, and with the broker directly, without
// the key provider's cache.
func (e *examination) tryKEK(ctx context.Context, kek string, wrap, unwrap ask) Step {
	direct := make(chan error, 1)
	go func() { direct <- roundTrip(ctx, e.ProviderNames[0], kek, e.Provider.WrapKey, e.Provider.UnwrapKey) }()
	err := roundTrip(keyprovider.Probe(ctx), e.ProviderNames[0], kek, wrap, unwrap)
	directly := <-direct
	if err == nil && directly == nil {
		return passed("")
	}
	if err == nil {
		return failed(fmt.Sprintf("pilot has KEK %q in its cache, but the broker does not release it now: %s", kek, directly), e.brokerFix(kek, directly)...)
	}
	detail := said(err)
	if !strings.Contains(detail, kek) {
		detail = fmt.Sprintf("KEK %q: %s", kek, detail)
	}
	if directly == nil {
		return failed(fmt.Sprintf("%s (the broker releases it with the settings in %s: pilot was started with others)", detail, e.Configuration), restartPilot...)
	}
	// The daemon has the same settings, and its error has lost its type.
	return failed(detail, e.brokerFix(kek, directly)...)
}

// roundTrip wraps a secret as a tool that encrypts does, and unwraps it as a
// pull does, which names no KEK.
func roundTrip(ctx context.Context, provider, kek string, wrap, unwrap ask) error {
	secret := make([]byte, 32)
	rand.Read(secret) // never fails
	wrapped, err := askFor(ctx, wrap, protocol.KeyProviderKeyWrapProtocolInput{
		Operation: protocol.OpKeyWrap,
		KeyWrapParams: protocol.KeyWrapParams{
			Ec:       &config.EncryptConfig{Parameters: map[string][][]byte{provider: {[]byte(kek)}}},
			OptsData: secret,
		},
	})
	if err != nil {
		return err
	}
	unwrapped, err := askFor(ctx, unwrap, protocol.KeyProviderKeyWrapProtocolInput{
		Operation: protocol.OpKeyUnwrap,
		KeyUnwrapParams: protocol.KeyUnwrapParams{
			Dc:         &config.DecryptConfig{},
			Annotation: wrapped.KeyWrapResults.Annotation,
		},
	})
	if err == nil && !bytes.Equal(unwrapped.KeyUnwrapResults.OptsData, secret) {
		err = errors.New("the unwrapped secret is not the one that was wrapped")
	}
	return err
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
