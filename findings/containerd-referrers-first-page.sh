#!/usr/bin/env bash
# containerd's registry client lists the referrers of a manifest from the first page
# of the registry's answer alone: it does not follow the Link header with which the
# distribution specification lets a registry split the list. And a referrers API that
# answers 500 is an empty list, without an error, where no tag stands in for it. Who
# asks "is this image signed?" by it may miss the signature.
#
# Exits non-zero if that changes. Needs Go and the network. The registry is an HTTP
# server in the same program, which has what the specification wants for this.
set -euo pipefail
containerd=v2.4.2

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
cat >main.go <<'GO'
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func page(w http.ResponseWriter, names ...string) {
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	for _, name := range names {
		index.Manifests = append(index.Manifests, ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString(name), Size: 2, ArtifactType: "application/vnd.example." + name,
		})
	}
	w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
	json.NewEncoder(w).Encode(index)
}

func main() {
	const referrers = "/v2/app/referrers/"
	broken, pages := false, 0
	registry := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case !strings.HasPrefix(r.URL.Path, referrers):
			http.NotFound(w, r)
		case broken:
			w.WriteHeader(http.StatusInternalServerError)
		case r.URL.Query().Get("last") == "":
			pages++
			w.Header().Set("Link", "<"+r.URL.Path+"?last=1>; rel=\"next\"")
			page(w, "sbom")
		default:
			pages++
			page(w, "signature")
		}
	}))
	defer registry.Close()
	hosts := docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost))
	ask := func() string {
		ctx := context.Background()
		ref := strings.TrimPrefix(registry.URL, "http://") + "/app:1"
		fetcher, err := docker.NewResolver(docker.ResolverOptions{Hosts: func(host string) ([]docker.RegistryHost, error) {
			list, err := hosts(host)
			for i := range list {
				list[i].Capabilities |= docker.HostCapabilityReferrers
			}
			return list, err
		}}).Fetcher(ctx, ref)
		if err != nil {
			panic(err)
		}
		list, err := fetcher.(remotes.ReferrersFetcher).FetchReferrers(ctx, digest.FromString("image"))
		var types []string
		for _, d := range list {
			types = append(types, d.ArtifactType)
		}
		return fmt.Sprintf("%q, error: %v", types, err)
	}
	first := ask()
	fmt.Printf("two pages, of an SBOM and a signature: %s; pages asked for: %d\n", first, pages)
	broken = true
	second := ask()
	fmt.Printf("the API answers 500: %s\n", second)
	if first != `["application/vnd.example.sbom"], error: <nil>` || pages != 1 || second != `[], error: <nil>` {
		fmt.Println("that has changed")
		os.Exit(1)
	}
}
GO
(go mod init finding && go get github.com/containerd/containerd/v2@$containerd && go mod tidy && go build -o finding .) >build.log 2>&1 || { tail build.log; exit 2; }
echo "github.com/containerd/containerd/v2 $containerd"
./finding 2>/dev/null
