package snapshotter

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/stargz-snapshotter/fs/source"
	"github.com/hashicorp/go-retryablehttp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// lazyPath is where the mirror serves parts of layers.
	lazyPath = "/lazy/v2"
	// requestTimeout bounds a request with its answer.
	requestTimeout = time.Minute
)

// sources returns a function that finds where to read a layer from by the labels that
// containerd gives to its snapshot: always pilot's mirror at that socket, never a
// registry.
func sources(socket string) source.GetSources {
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
		MaxIdleConnsPerHost: 16,
		IdleConnTimeout:     time.Minute,
	}
	hosts := func(reference.Spec) ([]docker.RegistryHost, error) {
		// stargz-snapshotter sets how it retries, for each layer.
		client := retryablehttp.NewClient()
		client.Logger = nil
		client.HTTPClient = &http.Client{Transport: transport, Timeout: requestTimeout}
		return []docker.RegistryHost{{
			Client: client.StandardClient(), Scheme: "http", Host: "pilot.invalid", Path: lazyPath,
			Capabilities: docker.HostCapabilityPull,
		}}, nil
	}
	return func(labels map[string]string) ([]source.Source, error) {
		name, err := reference.Parse(labels[snapshotters.TargetRefLabel])
		if err != nil {
			return nil, fmt.Errorf("label %s: %w", snapshotters.TargetRefLabel, err)
		}
		d, err := digest.Parse(labels[snapshotters.TargetLayerDigestLabel])
		if err != nil {
			return nil, fmt.Errorf("label %s: %w", snapshotters.TargetLayerDigestLabel, err)
		}
		s := source.Source{Hosts: hosts, Name: name, Target: ocispec.Descriptor{Digest: d, Annotations: labels}}
		// The layers above it, which are looked at meanwhile.
		for other := range strings.SplitSeq(labels[snapshotters.TargetImageLayersLabel], ",") {
			if d, err := digest.Parse(other); err == nil {
				s.Manifest.Layers = append(s.Manifest.Layers, ocispec.Descriptor{Digest: d})
			}
		}
		return []source.Source{s}, nil
	}
}
