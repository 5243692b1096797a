#!/usr/bin/env bash
# imgcrypt 2.0.3 decrypts an index only if it knows the media type of every blob in it.
# ocicrypt encrypts any blob, and an index may have one that is encrypted and no layer of
# a file system: the attestation that BuildKit adds to an image, with "+encrypted" after
# its media type. Then nothing is decrypted, not even the image itself, and the error is
# "bad/unhandled MediaType". A filter that selects the image's layers only changes
# nothing. With the attestation readable, the same index is decrypted.
#
# Exits non-zero if that changes. Needs Go and its module proxy.
set -euo pipefail
imgcrypt=v2.0.3
ocicrypt=v1.3.2
containerd=v2.4.2 # its content store

dir=$(mktemp -d)
trap 'chmod -R u+w "$dir"; rm -rf "$dir"' EXIT
cd "$dir"
cat >main.go <<'GO'
package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/imgcrypt/v2/images/encryption"
	"github.com/containers/ocicrypt"
	"github.com/containers/ocicrypt/config"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

var (
	ctx   = context.Background()
	store = must(local.NewStore(os.Args[1]))
)

func put(mediaType string, b []byte) v1.Descriptor {
	desc := v1.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	if err := content.WriteBlob(ctx, store, desc.Digest.String(), bytes.NewReader(b), desc); err != nil {
		panic(err)
	}
	return desc
}

func putJSON(mediaType string, v any) v1.Descriptor { return put(mediaType, must(json.Marshal(v))) }

func main() {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	public := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: must(x509.MarshalPKIXPublicKey(&key.PublicKey))})
	private := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: must(x509.MarshalPKCS8PrivateKey(key))})
	encrypt := must(config.EncryptWithJwe([][]byte{public}))
	decrypt := must(config.DecryptWithPrivKeys([][]byte{private}, [][]byte{nil}))

	blob := func(mediaType, text string, encrypted bool) v1.Descriptor {
		desc := v1.Descriptor{MediaType: mediaType, Digest: digest.FromString(text), Size: int64(len(text))}
		if !encrypted {
			return put(mediaType, []byte(text))
		}
		r, finish, err := ocicrypt.EncryptLayer(encrypt.EncryptConfig, strings.NewReader(text), desc)
		if err != nil {
			panic(err)
		}
		desc = put(mediaType+"+encrypted", must(io.ReadAll(r)))
		desc.Annotations = must(finish())
		return desc
	}
	manifest := func(os, arch string, layer v1.Descriptor) v1.Descriptor {
		conf := putJSON(v1.MediaTypeImageConfig, v1.Image{Platform: v1.Platform{OS: os, Architecture: arch}})
		m := v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, Config: conf, Layers: []v1.Descriptor{layer}}
		desc := putJSON(m.MediaType, m)
		desc.Platform = &v1.Platform{OS: os, Architecture: arch}
		return desc
	}
	for _, encrypted := range []bool{false, true} {
		image := manifest("linux", "amd64", blob(v1.MediaTypeImageLayer, "layer", true))
		attestation := manifest("unknown", "unknown", blob("application/vnd.in-toto+json", "{}", encrypted))
		attestation.Annotations = map[string]string{"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": image.Digest.String()}
		index := putJSON(v1.MediaTypeImageIndex, v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{image, attestation}})
		for name, filter := range map[string]encryption.LayerFilter{
			"every blob":        func(v1.Descriptor) bool { return true },
			"the image's layer": func(d v1.Descriptor) bool { return d.MediaType == v1.MediaTypeImageLayer+"+encrypted" },
		} {
			_, changed, err := encryption.DecryptImage(ctx, store, index, &decrypt, filter)
			fmt.Printf("attestation encrypted: %t, to decrypt: %s: decrypted: %t, error: %v\n", encrypted, name, changed, err)
		}
	}
}
GO
(
	go mod init example.com/finding &&
		go get github.com/containerd/imgcrypt/v2/images/encryption@$imgcrypt github.com/containers/ocicrypt@$ocicrypt github.com/containerd/containerd/v2/plugins/content/local@$containerd &&
		go build -o finding .
) >build.log 2>&1 || { tail build.log; exit 2; }
echo "github.com/containerd/imgcrypt/v2 $imgcrypt"
./finding store 2>run.log | sort | tee out
for what in "every blob" "the image's layer"; do
	grep -q "^attestation encrypted: false, to decrypt: $what: decrypted: true, error: <nil>" out
	grep -q "^attestation encrypted: true, to decrypt: $what: decrypted: false, error: bad/unhandled MediaType application/vnd.in-toto+json+encrypted" out
done
