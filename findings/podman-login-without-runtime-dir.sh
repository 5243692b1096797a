#!/usr/bin/env bash
# What "podman login", "skopeo login" and "buildah login" write where XDG_RUNTIME_DIR is not
# set, as under sudo, in cron jobs and in containers, crane, cosign and other programs with
# go-containerregistry do not find: containers/image writes /run/containers/UID/auth.json
# then, and go-containerregistry looks in XDG_RUNTIME_DIR and in the home directory alone.
# The login succeeds, and the next request of theirs is anonymous. With XDG_RUNTIME_DIR both
# use the same file.
#
# Exits non-zero if that changes. Needs root, for a /run of its own, and Go. Installs
# nothing on the machine.
set -euo pipefail
image=v5.42.1
registry=v0.22.1

dir=$(mktemp -d)
trap 'rm -rf --one-file-system "$dir"' EXIT
cd "$dir"
cat >go.mod <<END
module example.com/login
go 1.26
END
cat >main.go <<'GO'
package main

import (
	"fmt"
	"os"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"go.podman.io/image/v5/pkg/docker/config"
)

const host = "registry.example.com"

func must[T any](v T, err error) T {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	return v
}

func main() {
	fmt.Println("login writes", must(config.SetCredentials(nil, host, "somebody", "password")))
	fmt.Println("containers/image finds", must(config.GetCredentials(nil, host)).Username)
	found := must(must(authn.DefaultKeychain.Resolve(must(name.NewRegistry(host)))).Authorization())
	fmt.Printf("go-containerregistry finds %q\n", found.Username)
}
GO
export GOFLAGS=-mod=mod
go get "go.podman.io/image/v5@$image" "github.com/google/go-containerregistry@$registry" >get.log 2>&1 || { cat get.log; exit 2; }
CGO_ENABLED=0 go build -tags containers_image_openpgp -o login . 2>build.log || { cat build.log; exit 2; }

# Each time with an empty home and an empty /run.
run() {
	mkdir -p home
	unshare --mount sh -c 'mount -t tmpfs none /run && mkdir -p /run/user/0 && exec env -i PATH="$PATH" HOME='"$dir"'/home "$@"' sh "$@" ./login
	rm -r home
}
run >without
run XDG_RUNTIME_DIR=/run/user/0 >with

echo "containers/image $image, go-containerregistry $registry"
echo "without XDG_RUNTIME_DIR:"; sed 's/^/  /' without
echo "with it:"; sed 's/^/  /' with
diff without - <<'END'
login writes /run/containers/0/auth.json
containers/image finds somebody
go-containerregistry finds ""
END
diff with - <<'END'
login writes /run/user/0/containers/auth.json
containers/image finds somebody
go-containerregistry finds "somebody"
END
