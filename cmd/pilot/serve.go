package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v3"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/fips"
	"github.com/ctrlplane/pilot/internal/grpctls"
	"github.com/ctrlplane/pilot/internal/tracing"
	"github.com/ctrlplane/pilot/internal/unixsocket"
	"github.com/ctrlplane/pilot/internal/watchdog"
	"github.com/ctrlplane/pilot/keyprovider"
)

// stopTimeout is how long requests may still take when pilot stops: containerd may be
// unpacking a layer.
const stopTimeout = 10 * time.Second

// windowSize is how many bytes of a request a client may send ahead. A request with the
// largest annotation has 1.4 MB.
const windowSize = 1 << 20

// ballast is how many bytes are allocated and never touched, so that they take no memory.
// Go collects garbage when the heap has twice the size of what is in use, which is a few
// MB, and each request leaves some KB. With this there may be as much more garbage.
const ballast = 8 << 20

// connectTimeout is how long a client may take to set up its connection, and how long
// a readiness check may take.
const connectTimeout = 10 * time.Second

var serveCommand = &cli.Command{
	Name:  "serve",
	Usage: "run the key provider and containerd's differ as a daemon",
	Description: `Serves ocicrypt's key provider protocol, and a differ for containerd that decrypts
layers, over gRPC. On SIGHUP it reloads its configuration and drops the KEKs that
it has in memory.

Example:
   pilot serve --broker https://copilot.example.com:8443 --broker-ca ca.pem \
      --broker-cert node.pem --broker-key node-key.pem`,
	Flags:  configFlags(),
	Action: serve,
}

// The names of the sockets that systemd may pass.
const (
	keyproviderSocket = "keyprovider"
	diffSocket        = "diff"
	lazySocket        = "lazy"
)

func serve(ctx context.Context, c *cli.Command) error {
	defer runtime.KeepAlive(make([]byte, ballast))
	return runDaemon(ctx, c, serveAll)
}

// serveAll starts what "pilot serve" serves.
func serveAll(ctx context.Context, d *daemon) error {
	conf, g, provider, registry := &d.conf, d.group, d.provider, d.registry
	if conf.Listen == "" {
		return exit.Usagef("listen is not set, and has no default here: use --listen unix:///PATH on macOS, and --listen 127.0.0.1:PORT with --insecure-loopback or TLS on Windows")
	}
	options, err := conf.serverOptions()
	if err != nil {
		return exit.UsageError(err)
	}
	passed, err := activation.ListenersWithNames()
	if err != nil {
		return fmt.Errorf("sockets from systemd: %w", err)
	}
	l, err := listen(passed[keyproviderSocket], conf.Listen)
	if err != nil {
		return err
	}
	server := grpc.NewServer(append(options,
		grpc.ConnectionTimeout(connectTimeout),
		// Goroutines that are reused have grown their stacks already.
		grpc.NumStreamWorkers(uint32(2*runtime.GOMAXPROCS(0))),
		// Windows that do not grow need no pings to measure how much they should, of
		// which gRPC sends one for each request.
		grpc.StaticStreamWindowSize(windowSize), grpc.StaticConnWindowSize(windowSize),
		grpc.UnaryInterceptor(tracing.UnaryServer()))...)
	service := keyprovider.Service{Provider: provider, Names: conf.ProviderName, CoCo: keyprovider.CoCo(provider.current), Metrics: provider.metrics}
	service.Register(server)
	healthpb.RegisterHealthServer(server, health.NewServer())
	var diffListener net.Listener
	if conf.DiffListen != off {
		if diffListener, err = listen(passed[diffSocket], address(conf.DiffListen)); err != nil {
			return err
		}
	}
	conns, err := probes(l, diffListener)
	if err != nil {
		return err
	}
	ready := func(ctx context.Context) error { return checkHealth(ctx, conns) }
	var known layers
	if diffListener != nil || conf.LazyListen != off || conf.WorkloadsListen != off {
		if known, err = conf.openLayers(ctx, g, provider); err != nil {
			return err
		}
	}
	if err := conf.serveStatus(ctx, g, registry, known, ready); err != nil {
		return err
	}
	if diffListener != nil {
		// After listening: while another pilot has the socket, the mounts are in use.
		diffs, err := conf.diffServer(provider, known, registry)
		if err != nil {
			return err
		}
		serveUntilDone(ctx, g, diffs, diffListener)
	}
	if conf.MirrorListen != mirrorOff || conf.LazyListen != off {
		if err := conf.serveMirror(ctx, g, provider, known, registry, conf.Containerd, passed[lazySocket]); err != nil {
			return err
		}
	}
	if conf.WorkloadsListen != off {
		if err := conf.serveWorkloads(ctx, g, provider, known, registry); err != nil {
			return err
		}
	}
	serveUntilDone(ctx, g, server, l)
	go watchdog.Run(ctx, ready)

	logrus.WithFields(logrus.Fields{
		"listen": conf.Listen, "diff": conf.DiffListen, "broker": conf.Broker.String(), "format": conf.AnnotationFormat,
	}).Info("pilot serves")
	if mode := fips.Describe(); mode != "" {
		logrus.Info(mode)
	}
	if _, isUnix := conf.Listen.unix(); !isUnix && conf.TLSCert == "" {
		logrus.WithField("listen", conf.Listen).Warn("every user of this machine can request layer keys: there is no TLS (insecure-loopback)")
	}
	return nil
}

// serveUntilDone adds to g a server on l until ctx is done.
func serveUntilDone(ctx context.Context, g *errgroup.Group, s *grpc.Server, l net.Listener) {
	g.Go(func() error {
		if err := s.Serve(l); !errors.Is(err, grpc.ErrServerStopped) { // it was done before it served
			return err
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		defer time.AfterFunc(stopTimeout, s.Stop).Stop()
		s.GracefulStop()
		return nil
	})
}

// probes returns connections to the unix sockets among the listeners, which may be nil.
// TCP listeners may require a client certificate.
func probes(sockets ...net.Listener) (conns []*grpc.ClientConn, err error) {
	for _, l := range sockets {
		if l == nil || l.Addr().Network() != "unix" {
			continue
		}
		conn, err := grpc.NewClient("unix://"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return nil, err
		}
		conns = append(conns, conn)
	}
	return conns, nil
}

// checkHealth checks the health of the servers at the other end of conns. They stay
// open, so that this works while no more files can be opened.
func checkHealth(ctx context.Context, conns []*grpc.ClientConn) error {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	for _, conn := range conns {
		if _, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{}); err != nil {
			return fmt.Errorf("%s: %w", conn.Target(), err)
		}
	}
	return nil
}

// serverOptions returns the TLS of the configuration.
func (c *configuration) serverOptions() ([]grpc.ServerOption, error) {
	if !c.listensByTLS() {
		return nil, nil
	}
	options, err := grpctls.ServerOptions(c.TLSCert, c.TLSKey, c.TLSClientCA)
	if err != nil {
		return nil, fmt.Errorf("TLS: %w", err)
	}
	return options, nil
}

// listen returns the socket that systemd passed, if there is one, or listens on a.
func listen(passed []net.Listener, a address) (net.Listener, error) {
	if len(passed) > 0 {
		return passed[0], nil
	}
	if path, ok := a.unix(); ok {
		l, err := unixsocket.Listen(path)
		if err != nil {
			return nil, fmt.Errorf("listen: %w", err)
		}
		return l, nil
	}
	return net.Listen("tcp", string(a))
}
