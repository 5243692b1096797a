package keyprovider

import (
	"testing"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/processor/ocicryptclient"
)

// BenchmarkUnwrapKey unwraps with a KEK that is cached, for another program.
func BenchmarkUnwrapKey(b *testing.B) {
	p := newProvider(b, startBroker(b, map[string][]byte{"a": nil}).url, Config{CacheSize: 1})
	quiet(b)
	service := Service{Provider: p}
	input := unwrapRequest(b, wrapFor(b, p, "a"))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := service.answer(b.Context(), ocicryptclient.Unwrap, input, false); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkWrapKey wraps with a KEK that is cached, for another program.
func BenchmarkWrapKey(b *testing.B) {
	p := newProvider(b, startBroker(b, map[string][]byte{"a": nil}).url, Config{CacheSize: 1})
	quiet(b)
	service := Service{Provider: p}
	input := wrapRequest(b, "a")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := service.answer(b.Context(), ocicryptclient.Wrap, input, false); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkUnwrapKeyInProcess unwraps with a KEK that is cached, as for the differ.
func BenchmarkUnwrapKeyInProcess(b *testing.B) {
	p := newProvider(b, startBroker(b, map[string][]byte{"a": nil}).url, Config{CacheSize: 1})
	quiet(b)
	annotation := wrapFor(b, p, "a")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := p.UnwrapKey(b.Context(), nil, annotation); err != nil {
			b.Fatal(err)
		}
	}
}

// quiet has nothing logged but what failed.
func quiet(b *testing.B) {
	level := logrus.GetLevel()
	logrus.SetLevel(logrus.WarnLevel)
	b.Cleanup(func() { logrus.SetLevel(level) })
}
