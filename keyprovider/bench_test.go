package keyprovider

import (
	"testing"

	"github.com/sirupsen/logrus"
)

// BenchmarkUnwrapKey unwraps with a KEK that is cached.
func BenchmarkUnwrapKey(b *testing.B) {
	p := newProvider(b, startBroker(b, map[string][]byte{"a": nil}).url, Config{CacheSize: 1})
	quiet(b)
	input := unwrapRequest(b, wrapFor(b, p, "a"))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := p.UnwrapKey(b.Context(), input); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkWrapKey wraps with a KEK that is cached.
func BenchmarkWrapKey(b *testing.B) {
	p := newProvider(b, startBroker(b, map[string][]byte{"a": nil}).url, Config{CacheSize: 1})
	quiet(b)
	input := wrapRequest(b, "a")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := p.WrapKey(b.Context(), input); err != nil {
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
