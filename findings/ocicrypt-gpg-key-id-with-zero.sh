#!/usr/bin/env bash
# ocicrypt asks gpg for a key by its ID in hexadecimal digits without leading zeros. gpg
# takes that for no key ID, and one key in sixteen begins with a zero: the names of such
# recipients are not found.
set -euo pipefail
command -v gpg >/dev/null || { apt-get -qq update && apt-get -qq install --no-install-recommends gnupg; } >/dev/null
dir=$(mktemp -d)
export GOFLAGS=-buildvcs=false GNUPGHOME=$dir/gnupg
trap 'gpgconf --kill all 2>/dev/null; chmod -R u+w "$dir"; rm -rf "$dir"' EXIT
mkdir -m 0700 "$GNUPGHOME"
cd "$dir"
cat >main.go <<'GO'
package main

import (
	"fmt"
	"os"
	"strconv"

	"github.com/containers/ocicrypt"
)

func main() {
	client, err := ocicrypt.NewGPGClient("v1", os.Getenv("GNUPGHOME"))
	if err != nil {
		panic(err)
	}
	id, err := strconv.ParseUint(os.Args[1], 16, 64)
	if err != nil {
		panic(err)
	}
	_, found, err := client.GetKeyDetails(id)
	if err != nil {
		fmt.Println(err)
	}
	fmt.Println(found)
}
GO
(go mod init example.com/module && go get github.com/containers/ocicrypt@v1.3.2 && go mod tidy && go build -o program .) >log 2>&1 || { cat log; exit 1; }
with= without=
for i in $(seq 500); do
	gpg --batch --quiet --passphrase '' --quick-generate-key "user$i@example.com" ed25519 cert never 2>/dev/null
	id=$(gpg --with-colons --list-keys "user$i@example.com" 2>/dev/null | awk -F: '$1 == "pub" { print $5 }')
	case $id in
	0*) with=$id ;;
	*) without=$id ;;
	esac
	[ -z "$with" ] || [ -z "$without" ] || break
done
echo "ocicrypt 1.3.2, $(gpg --version | head -1):"
echo "details of a key whose ID begins with another digit are found: $(./program "$without")"
echo "details of a key whose ID begins with 0 are found: $(./program "$with" | tail -1)"
gpg --list-keys "0x$with" >/dev/null 2>&1
[ "$(./program "$without")" = true ]
[ "$(./program "$with" | tail -1)" = false ]
