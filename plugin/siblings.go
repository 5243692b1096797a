package plugin

import (
	"maps"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxSiblingBytes bounds the key annotations that are remembered. A layer has
// some 1 KB of them.
const maxSiblingBytes = 8 << 20

// siblings remembers the key annotations in manifests that a layer was found in.
// BuildKit resolves a base image, which it has in an imported cache, and then lets
// containerd collect its manifest while layers of the image are still to be
// unpacked. It is safe for concurrent use.
type siblings struct {
	mu     sync.Mutex
	layers map[sibling][]map[string]string
	bytes  int
}

// sibling is a layer in a namespace: others may be other tenants'.
type sibling struct {
	namespace string
	layer     digest.Digest
}

// add remembers the key annotations of a layer, and forgets all others when there
// are too many.
func (s *siblings) add(namespace string, l ocispec.Descriptor) {
	annotations := withKeysOf(ocispec.Descriptor{}, l).Annotations
	size := 0
	for key, value := range annotations {
		size += len(key) + len(value)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	of := sibling{namespace, l.Digest}
	known := s.layers[of]
	if size > maxSiblingBytes || slices.ContainsFunc(known, func(k map[string]string) bool { return maps.Equal(k, annotations) }) {
		return
	}
	if s.bytes += size; s.layers == nil || s.bytes > maxSiblingBytes {
		s.layers, s.bytes, known = make(map[sibling][]map[string]string), size, nil
	}
	s.layers[of] = append(known, annotations)
}

// of returns desc once with each set of key annotations that is remembered for its
// layer, maxDescriptors at most.
func (s *siblings) of(namespace string, desc ocispec.Descriptor) []ocispec.Descriptor {
	s.mu.Lock()
	defer s.mu.Unlock()
	var found []ocispec.Descriptor
	for _, annotations := range s.layers[sibling{namespace, desc.Digest}] {
		if len(found) < maxDescriptors {
			found = append(found, withKeysOf(desc, ocispec.Descriptor{Annotations: annotations}))
		}
	}
	return found
}
