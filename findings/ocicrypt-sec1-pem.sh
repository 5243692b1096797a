#!/usr/bin/env bash
# ocicrypt reads an EC private key in SEC 1 form (RFC 5915) as DER, and not the same
# bytes in PEM, which is what "openssl ecparam -genkey" writes. Tools built on it call
# such a file unidentified. PKCS #8 it reads in both.
#
# Exits non-zero if that changes. Needs Go and the network.
set -euo pipefail
ocicrypt=v1.3.2

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
cat >main.go <<'GO'
package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"

	"github.com/containers/ocicrypt/utils"
)

func main() {
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	sec1, _ := x509.MarshalECPrivateKey(key)
	pkcs8, _ := x509.MarshalPKCS8PrivateKey(key)
	inPEM := func(kind string, der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}) }
	got := ""
	for _, form := range []struct {
		name string
		key  []byte
	}{
		{"PKCS #8, DER", pkcs8}, {"PKCS #8, PEM", inPEM("PRIVATE KEY", pkcs8)},
		{"SEC 1, DER", sec1}, {"SEC 1, PEM", inPEM("EC PRIVATE KEY", sec1)},
	} {
		ok, err := utils.IsPrivateKey(form.key, nil)
		fmt.Printf("%s: private key: %v (%v)\n", form.name, ok, err)
		got += fmt.Sprint(ok, " ")
	}
	if got != "true true true false " {
		fmt.Println("that has changed")
		os.Exit(1)
	}
}
GO
(go mod init finding && go get github.com/containers/ocicrypt@$ocicrypt && go mod tidy && go build -o finding .) >build.log 2>&1 || { tail build.log; exit 2; }
echo "github.com/containers/ocicrypt $ocicrypt"
./finding
