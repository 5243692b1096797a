//go:build deps

// Package deps keeps the module's dependencies listed while the packages that
// use them are being written.
package deps

import (
	_ "github.com/containerd/containerd/v2/client"
	_ "github.com/containerd/containerd/v2/cmd/ctr/app"
	_ "github.com/containerd/imgcrypt/v2/images/encryption/parsehelpers"
	_ "github.com/containers/ocicrypt"
	_ "github.com/pelletier/go-toml/v2"
	_ "github.com/rogpeppe/go-internal/testscript"
	_ "github.com/urfave/cli/v2"
	_ "github.com/urfave/cli/v3"
	_ "go.etcd.io/bbolt"
	_ "golang.org/x/sync/singleflight"
	_ "golang.org/x/sync/errgroup"
	_ "google.golang.org/grpc"
)
