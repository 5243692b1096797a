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
		return skipped("the key provider at " + e.Listen + " takes clients with a certificate only")
	}
	if len(e.KEKs) == 0 {
		return skipped("no KEK is known to try: name one that this node uses with --kek")
	}
	conn, err := dial(e.Listen)
	if err != nil {
		return failed(err.Error())
	}
	defer conn.Close()
	// A broker that is down is waited for, so all KEKs at once.
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

// tryKEK asks the key provider, and the broker without what the key provider
// has in its cache.
func (e *examination) tryKEK(ctx context.Context, kek string, wrap, unwrap ask) Step {
	direct := make(chan error, 1)
	go func() { direct <- roundTrip(ctx, e.ProviderNames[0], kek, e.Provider.WrapKey, e.Provider.UnwrapKey) }()
	err := roundTrip(keyprovider.Probe(ctx), e.ProviderNames[0], kek, wrap, unwrap)
	directly := <-direct
	if err == nil && directly == nil {
		return passed("")
	}
	if err == nil {
		return failed(fmt.Sprintf("pilot still knows KEK %q, and the broker does not give it now: %s", kek, directly), e.brokerFix(kek, directly)...)
	}
	detail := said(err)
	if !strings.Contains(detail, kek) {
		detail = fmt.Sprintf("KEK %q: %s", kek, detail)
	}
	if directly == nil {
		return failed(fmt.Sprintf("%s (with the settings of %s the broker gives it: pilot was started with others)", detail, e.Configuration), restartPilot...)
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
		err = errors.New("what was wrapped came back as something else")
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
		err = errors.New("the answer is not the JSON of the key provider protocol")
	}
	return out, err
}

// unique returns the different strings of list, in their order.
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
