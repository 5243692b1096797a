#!/usr/bin/env bash
# ocicrypt encrypts a layer for any number of JWE recipients and reports success. With
# go-jose 4.1.9, the same ocicrypt can't decrypt the layer if there are 33 or more: go-jose
# parses no JWE of more than 32 recipients unless jose.MaxRecipients is raised. No recipient's
# key opens the layer, and the error is "no suitable key found for decrypting layer key".
# With go-jose 4.1.5 the same layer decrypts.
#
# Exits non-zero if that changes. Needs Go and its module proxy.
set -euo pipefail
ocicrypt=v1.3.2

dir=$(mktemp -d)
trap 'chmod -R u+w "$dir"; rm -rf "$dir"' EXIT
cd "$dir"
cat >main.go <<'GO'
package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"strings"

	"github.com/containers/ocicrypt"
	"github.com/containers/ocicrypt/config"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func main() {
	for _, n := range []int{32, 33} {
		var public [][]byte
		var private []byte
		for range n {
			key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
			public = append(public, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: must(x509.MarshalPKIXPublicKey(&key.PublicKey))}))
			private = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: must(x509.MarshalPKCS8PrivateKey(key))})
		}
		cc := must(config.EncryptWithJwe(public))
		r, finish, err := ocicrypt.EncryptLayer(cc.EncryptConfig, strings.NewReader("layer"), ocispec.Descriptor{})
		if err != nil {
			panic(err)
		}
		layer := must(io.ReadAll(r))
		desc := ocispec.Descriptor{Annotations: must(finish())}
		fmt.Printf("%d recipients: encrypted\n", n)
		dc := must(config.DecryptWithPrivKeys([][]byte{private}, [][]byte{nil}))
		if _, _, err := ocicrypt.DecryptLayer(dc.DecryptConfig, bytes.NewReader(layer), desc, false); err != nil {
			fmt.Printf("%d recipients: not decrypted: %s\n", n, strings.Join(strings.Fields(err.Error()), " "))
		} else {
			fmt.Printf("%d recipients: decrypted\n", n)
		}
	}
}
GO
go mod init finding >/dev/null 2>&1
for jose in v4.1.5 v4.1.9; do
	go get github.com/containers/ocicrypt@$ocicrypt github.com/go-jose/go-jose/v4@$jose >get.log 2>&1 || { cat get.log; exit 2; }
	echo "ocicrypt $ocicrypt, go-jose $(go list -m -f '{{.Version}}' github.com/go-jose/go-jose/v4)"
	go run . 2>&1 | tee "$jose.out"
done
grep -qx '33 recipients: decrypted' v4.1.5.out
grep -qx '32 recipients: decrypted' v4.1.9.out
grep -q '^33 recipients: not decrypted' v4.1.9.out
echo "as described"
