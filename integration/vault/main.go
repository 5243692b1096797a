// vault-dev is a Vault server for tests: Vault's own core and HTTP API with the
// secrets engines kv and transit and the auth methods approle and cert, and
// none of the rest of it, which takes long to build.
//
//	vault-dev -dir DIR -listen unix:DIR/vault.sock
//
// DIR holds its storage, and after the first start also root-token and
// unseal-key, with which it unseals itself.
package main

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	_ "unsafe" // for go:linkname

	"github.com/hashicorp/go-hclog"
	kv "github.com/hashicorp/vault-plugin-secrets-kv"
	"github.com/hashicorp/vault/builtin/credential/approle"
	"github.com/hashicorp/vault/builtin/credential/cert"
	"github.com/hashicorp/vault/builtin/logical/transit"
	vaulthttp "github.com/hashicorp/vault/http"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/physical/file"
	"github.com/hashicorp/vault/vault"
)

func main() {
	dir := flag.String("dir", "", "keep the storage, root-token and unseal-key in `DIR`")
	listen := flag.String("listen", "", "answer on `ADDRESS`: HOST:PORT or unix:PATH")
	tlsCert := flag.String("tls-cert", "", "answer by TLS with the certificate in `FILE`")
	tlsKey := flag.String("tls-key", "", "and its key in `FILE`")
	sealed := flag.Bool("sealed", false, "stay sealed")
	flag.Parse()
	if err := run(*dir, *listen, *tlsCert, *tlsKey, *sealed); err != nil {
		fmt.Fprintln(os.Stderr, "vault-dev:", err)
		os.Exit(1)
	}
}

func run(dir, listen, tlsCert, tlsKey string, sealed bool) error {
	logger := hclog.New(&hclog.LoggerOptions{Level: hclog.Warn})
	storage, err := file.NewFileBackend(map[string]string{"path": filepath.Join(dir, "storage")}, logger)
	if err != nil {
		return err
	}
	core, err := vault.NewCore(&vault.CoreConfig{
		Physical:           storage,
		LogicalBackends:    engines,
		CredentialBackends: methods,
		BuiltinRegistry:    builtins{},
		DisableMlock:       true,
		DisableCache:       true,
		Logger:             logger,
	})
	if err != nil {
		return err
	}
	defer core.Shutdown()
	if !sealed {
		if err := unseal(core, dir); err != nil {
			return err
		}
	}

	network, address := "tcp", listen
	if path, ok := strings.CutPrefix(listen, "unix:"); ok {
		network, address = "unix", path
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	l, err := net.Listen(network, address)
	if err != nil {
		return err
	}
	server := &http.Server{Handler: vaulthttp.Handler.Handler(&vault.HandlerProperties{Core: core})}
	if tlsCert != "" {
		server.TLSConfig = &tls.Config{ClientAuth: tls.RequestClientCert} // the method cert decides about them
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	go func() {
		<-ctx.Done()
		server.Close()
	}()
	if tlsCert != "" {
		err = server.ServeTLS(l, tlsCert, tlsKey)
	} else {
		err = server.Serve(l)
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// unseal unseals core, and initializes it before if nobody did.
func unseal(core *vault.Core, dir string) error {
	name := filepath.Join(dir, "unseal-key")
	key, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		init, err := core.Initialize(context.Background(), &vault.InitParams{
			BarrierConfig:  &vault.SealConfig{SecretShares: 1, SecretThreshold: 1},
			RecoveryConfig: &vault.SealConfig{},
		})
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, "root-token"), []byte(init.RootToken), 0o600); err != nil {
			return err
		}
		key = []byte(hex.EncodeToString(init.SecretShares[0]))
		if err := os.WriteFile(name, key, 0o600); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	share, err := hex.DecodeString(string(key))
	if err != nil {
		return err
	}
	ok, err := core.Unseal(share)
	if err == nil && !ok {
		err = errors.New("it is still sealed")
	}
	return err
}

var (
	engines = map[string]logical.Factory{"kv": kv.Factory, "transit": newTransit}
	methods = map[string]logical.Factory{"approle": approle.Factory, "cert": cert.Factory}
)

func newTransit(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
	b, err := transit.Backend(ctx, conf)
	if err != nil {
		return nil, err
	}
	b.Paths = withoutCreation(b.Paths)
	return b, b.Setup(ctx, conf)
}

// enterprisePaths makes stubs of what Vault Enterprise has.
//
//go:linkname enterprisePaths github.com/hashicorp/vault/vault.entPaths
var enterprisePaths func(*vault.SystemBackend) []*framework.Path

func init() {
	paths := enterprisePaths
	enterprisePaths = func(b *vault.SystemBackend) []*framework.Path { return withoutCreation(paths(b)) }
}

// withoutCreation takes the creation from paths that can't tell whether there
// is something already. Vault never creates there, but the SDK that is
// published for this release is newer than the one in it, and panics at that.
func withoutCreation(paths []*framework.Path) []*framework.Path {
	for _, p := range paths {
		if p.ExistenceCheck == nil {
			delete(p.Operations, logical.CreateOperation)
			delete(p.Callbacks, logical.CreateOperation)
		}
	}
	return paths
}

// builtins tells the core that engines and methods are no external plugins.
type builtins struct{}

func of(kind consts.PluginType) map[string]logical.Factory {
	switch kind {
	case consts.PluginTypeSecrets:
		return engines
	case consts.PluginTypeCredential:
		return methods
	}
	return nil
}

func (builtins) Contains(name string, kind consts.PluginType) bool {
	_, ok := of(kind)[name]
	return ok
}

func (builtins) Get(name string, kind consts.PluginType) (func() (any, error), bool) {
	factory, ok := of(kind)[name]
	return func() (any, error) { return factory, nil }, ok
}

func (builtins) Keys(kind consts.PluginType) []string {
	var names []string
	for name := range of(kind) {
		names = append(names, name)
	}
	return names
}

func (b builtins) DeprecationStatus(name string, kind consts.PluginType) (consts.DeprecationStatus, bool) {
	return consts.Supported, b.Contains(name, kind)
}

func (builtins) IsBuiltinEntPlugin(string, consts.PluginType) bool { return false }
