package main

import (
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/containerd/console"
	"github.com/containerd/containerd/v2/pkg/progress"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// progressLine shows on a terminal how far layers are.
type progressLine struct {
	verb  string
	start time.Time

	mu     sync.Mutex
	layers map[string]bool
	done   int64 // bytes
	shown  time.Time
}

// newProgress returns a line on standard error if that is a terminal.
func newProgress(verb string) *progressLine {
	p := &progressLine{verb: verb, start: time.Now()}
	if _, err := console.ConsoleFromFile(os.Stderr); err == nil {
		p.layers = make(map[string]bool)
	}
	return p
}

func (p *progressLine) add(layer ocispec.Descriptor, n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.layers == nil {
		return
	}
	p.done += int64(n)
	p.layers[layer.Digest.String()] = true
	if time.Since(p.shown) > 200*time.Millisecond {
		p.shown = time.Now()
		fmt.Fprintf(os.Stderr, "\r\033[K%sing: %d layers, %v at %v", p.verb, len(p.layers), progress.Bytes(p.done), progress.NewBytesPerSecond(p.done, time.Since(p.start)))
	}
}

func (p *progressLine) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.shown.IsZero() {
		fmt.Fprint(os.Stderr, "\r\033[K")
	}
}
