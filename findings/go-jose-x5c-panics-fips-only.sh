#!/usr/bin/env bash
# go-jose panics on a JSON Web Key that has a certificate (x5c) where Go allows only what
# FIPS 140-3 approves: it computes the certificate's SHA-1, whether the key has an x5t or
# not. Entra ID and Keycloak publish keys with x5c, and go-oidc fetches keys in a
# goroutine of its own, so there the panic ends the program.
#
# Exits non-zero if that changes. Needs Go and the network.
set -euo pipefail
jose=v4.1.9

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
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"time"

	"github.com/go-jose/go-jose/v4"
)

func main() {
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	plain, _ := json.Marshal(jose.JSONWebKey{Key: key.Public(), KeyID: "1"})
	var members map[string]any
	json.Unmarshal(plain, &members)
	members["x5c"] = []string{base64.StdEncoding.EncodeToString(der)}
	withCertificate, _ := json.Marshal(members)
	for _, text := range [][]byte{plain, withCertificate} {
		var parsed jose.JSONWebKey
		err := parsed.UnmarshalJSON(text)
		fmt.Printf("%d certificates: %v\n", len(parsed.Certificates), err)
	}
}
GO
(go mod init finding && go get github.com/go-jose/go-jose/v4@$jose && go mod tidy && go build -o finding .) >build.log 2>&1 || { tail build.log; exit 2; }
echo "github.com/go-jose/go-jose/v4 $jose"
./finding | tee out
[ "$(cat out)" = $'0 certificates: <nil>\n1 certificates: <nil>' ] || { echo "that has changed"; exit 1; }
echo "with GODEBUG=fips140=only:"
! GODEBUG=fips140=only ./finding >out 2>err || { echo "that has changed"; exit 1; }
cat out && head -1 err
grep -q '^panic: crypto/sha1: use of SHA-1 is not allowed' err && grep -q 'jwk.go' err || { echo "that has changed"; exit 1; }
