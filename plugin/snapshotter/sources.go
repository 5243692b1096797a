package snapshotter

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/fs/source"
	"github.com/hashicorp/go-retryablehttp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// lazyPath is where the mirror serves parts of layers.
	lazyPath = "/lazy/v2"
	// pilotHost is in requests. The transport connects to the socket.
	pilotHost = "pilot.invalid"
	// requestTimeout bounds a request with its answer.
	requestTimeout = time.Minute
	// askTimeout bounds all attempts to have pilot decide about a layer. stargz-snapshotter
	// gives as much time to a mount.
	askTimeout = 30 * time.Second
)

// pilot is the mirror of a pilot on this machine: the only host of all layers, so that no
// registry is ever asked.
type pilot struct{ transport *http.Transport }

// pilotAt returns the pilot that serves parts of layers at a unix socket.
func pilotAt(socket string) pilot {
	return pilot{&http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
		MaxIdleConnsPerHost: 16,
		IdleConnTimeout:     time.Minute,
	}}
}

func (p pilot) client() *retryablehttp.Client {
	client := retryablehttp.NewClient()
	client.Logger = nil
	client.HTTPClient = &http.Client{Transport: p.transport, Timeout: requestTimeout}
	return client
}

// sources returns where to read a layer from.
func (p pilot) sources(labels map[string]string) ([]source.Source, error) {
	name, d, err := layerOf(labels)
	if err != nil {
		return nil, err
	}
	hosts := func(reference.Spec) ([]docker.RegistryHost, error) {
		// stargz-snapshotter sets how it retries, for each layer.
		return []docker.RegistryHost{{
			Client: p.client().StandardClient(), Scheme: "http", Host: pilotHost, Path: lazyPath,
			Capabilities: docker.HostCapabilityPull,
		}}, nil
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

// ask returns an error unless pilot says that a layer, with the table of contents that it is
// mounted by, may be used now as the snapshot that it is. If starts is true, a container needs
// it, which does not start otherwise.
func (p pilot) ask(ctx context.Context, labels map[string]string, starts bool) error {
	name, d, err := layerOf(labels)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	registry := name.Hostname()
	query := url.Values{"ns": {registry}, "toc": {labels[estargz.TOCJSONDigestAnnotation]}, "snapshot": {labels[snapshots.LabelSnapshotRef]}}
	if starts {
		query.Set("for", "container") // in pilot's log
	}
	at := url.URL{
		Scheme: "http", Host: pilotHost, Path: lazyPath + "/" + strings.TrimPrefix(name.Locator, registry+"/") + "/blobs/" + d.String(),
		RawQuery: query.Encode(),
	}
	req, err := retryablehttp.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
	if err != nil {
		return err
	}
	// As stargz-snapshotter asks.
	req.Header.Set("Range", "bytes=0-1")
	client := p.client()
	client.RetryMax, client.RetryWaitMin, client.RetryWaitMax = 5, 30*time.Millisecond, time.Second
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("pilot: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusPartialContent {
		return fmt.Errorf("pilot refuses layer %s: %s, and its log says why", d, resp.Status)
	}
	_, err = io.Copy(io.Discard, io.LimitReader(resp.Body, 2)) // for the next request
	return err
}

// layerOf returns the image and the layer of a snapshot, by the labels that containerd gives
// to it.
func layerOf(labels map[string]string) (image reference.Spec, layer digest.Digest, err error) {
	if image, err = reference.Parse(labels[snapshotters.TargetRefLabel]); err != nil {
		return image, "", fmt.Errorf("label %s: %w", snapshotters.TargetRefLabel, err)
	}
	if layer, err = digest.Parse(labels[snapshotters.TargetLayerDigestLabel]); err != nil {
		return image, "", fmt.Errorf("label %s: %w", snapshotters.TargetLayerDigestLabel, err)
	}
	return image, layer, nil
}
