package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v3"
	"golang.org/x/sync/errgroup"

	brokerclient "github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/claims"
	"github.com/ctrlplane/pilot/internal/dockerconfig"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/mirror"
	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/plugin"
)

var mirrorCommand = &cli.Command{
	Name:  "mirror",
	Usage: "serve encrypted images as plain ones, to tools that can't decrypt",
	Description: `A registry to pull from, on a loopback address: it has the images of other
registries, decrypted. "pilot serve" does the same with mirror-listen set; this
command runs the mirror alone, for CI and scanners.

Callers show a client certificate (tls-client-ca), or the secret in
mirror-secret-file, as the password of any user. The file is made if it does not
exist. Names begin with their registry, unless --mirror-upstream names one.

Example:
   pilot mirror --mirror-listen 127.0.0.1:5000 --mirror-secret-file mirror.secret &
   podman login --tls-verify=false -u pilot --password-stdin 127.0.0.1:5000 <mirror.secret
   podman pull --tls-verify=false 127.0.0.1:5000/registry.example.com/team/app:1`,
	Flags: configFlags(append(brokerSettings, "mirror-listen", "mirror-secret-file", "mirror-upstream", "mirror-allowed-upstreams", "mirror-hosts-dir", "tls-cert", "tls-key", "tls-client-ca",
		"provider-name", "default-keks", "kbs-keks", "age-identities", "decryption-keys-path", "kek-cache-ttl", "kek-cache-grace", "kek-cache-idle", "kek-cache-size", "admin-listen", "metrics-listen", "log-level")...),
	Action: serveMirrorOnly,
}

func serveMirrorOnly(ctx context.Context, c *cli.Command) error {
	return runDaemon(ctx, c, func(ctx context.Context, d *daemon) error {
		if d.conf.MirrorListen == mirrorOff {
			return exit.Usagef("--mirror-listen HOST:PORT is missing, as in 127.0.0.1:5000")
		}
		if d.conf.AdminListen == "" {
			d.conf.AdminListen = off // the default is that of pilot serve
		}
		if err := d.conf.serveStatus(ctx, d.group, d.registry, layers{}, func(context.Context) error { return nil }); err != nil {
			return err
		}
		d.conf.LazyListen = off
		return d.conf.serveMirror(ctx, d.group, d.provider, layers{}, d.registry, "", nil)
	})
}

// serveMirror adds to g the mirror on mirror-listen and lazy-listen, until ctx is done. The
// snapshotter of the containerd that listens on a socket may request parts of layers, if one
// is given. lazy are sockets from systemd for that.
func (c *configuration) serveMirror(ctx context.Context, g *errgroup.Group, provider *reloadable, known layers, metrics prometheus.Registerer, socket socketPath, lazy []net.Listener) error {
	conf := mirror.Config{
		Keys:               c.keys(provider),
		DecryptionKeysPath: c.DecryptionKeys,
		Unavailable:        func(err error) bool { return errors.Is(err, brokerclient.ErrUnavailable) },
		Upstream:           c.MirrorUpstream,
		AllowedUpstreams:   c.MirrorAllowed,
		HostsDir:           c.MirrorHostsDir,
		Credentials:        dockerconfig.Credentials,
		Metrics:            metrics,
		Record:             known.record,
		Rules:              provider.rules,
	}
	if socket != "" {
		client, err := plugin.Dial(string(socket))
		if err != nil {
			return fmt.Errorf("containerd: %w", err)
		}
		conf.Images = &claims.Finder{Client: client}
		conf.LayerKeyLifetime = func() (ttl, grace time.Duration) {
			now := provider.configuration()
			return now.layerKeyTTL(), now.KEKCacheGrace
		}
	}
	var serverTLS *tls.Config
	if c.TLSCert != "" {
		clients, err := certfile.LoadAuthorities(c.TLSClientCA)
		if err != nil {
			return exit.Usagef("tls-client-ca: %w", err)
		}
		conf.Clients = clients
		// A caller that knows the secret needs no certificate, but only on loopback.
		optional := c.MirrorSecretFile != "" && address(c.MirrorListen).loopback()
		if serverTLS, err = certfile.Server(c.TLSCert, c.TLSKey, clients, optional); err != nil {
			return exit.Usagef("TLS: %w", err)
		}
	}
	if c.MirrorSecretFile != "" {
		secret, err := mirror.Secret(c.MirrorSecretFile)
		if err != nil {
			return exit.Usagef("mirror-secret-file: %w", err)
		}
		conf.Secret = secret
	}
	m := mirror.New(conf)
	provider.afterReload = append(provider.afterReload, m.ForgetKeys)
	if c.LazyListen != off {
		l, err := listen(lazy, address(c.LazyListen))
		if err != nil {
			return fmt.Errorf("lazy-listen: %w", err)
		}
		serveHTTPUntilDone(ctx, g, "mirror", m.LazyServer(), l)
		if conf.Images != nil {
			g.Go(func() error {
				m.PreserveLazy(ctx, containerd.LazySnapshotter)
				return nil
			})
		}
	}
	if c.MirrorListen == mirrorOff {
		return nil
	}
	l, err := net.Listen("tcp", string(c.MirrorListen))
	if err != nil {
		return fmt.Errorf("mirror-listen: %w", err)
	}
	logrus.WithFields(logrus.Fields{"mirror": l.Addr().String(), "tls": serverTLS != nil, "upstream": c.MirrorUpstream}).Info("pilot mirrors registries")
	if _, port, err := net.SplitHostPort(l.Addr().String()); err == nil && serverTLS == nil {
		if n, err := strconv.Atoi(port); err == nil && n >= firstUnprivilegedPort {
			logrus.WithField("mirror", l.Addr().String()).Warn("without TLS, any user of this machine can take this port while pilot is down, and learn the secret: use a port below 1024, or tls-cert")
		}
	}
	l = mirror.Listener(l)
	if serverTLS != nil {
		l = tls.NewListener(l, serverTLS)
	}
	serveHTTPUntilDone(ctx, g, "mirror", m.Server(), l)
	return nil
}

// serveHTTPUntilDone adds to g a server of that name on l until ctx is done.
func serveHTTPUntilDone(ctx context.Context, g *errgroup.Group, name string, s *http.Server, l net.Listener) {
	g.Go(func() error {
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("%s: %w", name, err)
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		within, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		if err := s.Shutdown(within); err != nil {
			return s.Close()
		}
		return nil
	})
}

// layerKeyTTL returns for how long the key of a layer may be used without asking for it again:
// no longer than the KEK that unwraps it would be kept.
func (c *configuration) layerKeyTTL() time.Duration {
	switch {
	case c.KEKCacheSize == 0:
		return time.Second
	case c.KEKCacheIdle > 0 && (c.KEKCacheTTL == 0 || c.KEKCacheIdle < c.KEKCacheTTL):
		return c.KEKCacheIdle
	}
	return c.KEKCacheTTL
}

// firstUnprivilegedPort is the first port that any user may listen on.
const firstUnprivilegedPort = 1024

// checkMirror returns an error if others could read images through the mirror, or nobody.
func (c *configuration) checkMirror() error {
	if c.MirrorUpstream != "" {
		if err := mirror.CheckRegistry(c.MirrorUpstream); err != nil {
			return fmt.Errorf("mirror-upstream: %w", err)
		}
	}
	switch {
	case c.MirrorListen == mirrorOff || c.TLSCert != "":
		return nil
	case !address(c.MirrorListen).loopback():
		return fmt.Errorf("mirror-listen = %q needs tls-cert, tls-key and tls-client-ca, so that only callers with a certificate can read images; a loopback address does with mirror-secret-file", c.MirrorListen)
	case c.MirrorSecretFile == "":
		return fmt.Errorf("mirror-listen = %q needs mirror-secret-file, or tls-cert, tls-key and tls-client-ca: every user of this machine could read images", c.MirrorListen)
	}
	return nil
}
