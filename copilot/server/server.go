package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/pki"
	"github.com/ctrlplane/pilot/copilot/server/caller"
	"github.com/ctrlplane/pilot/copilot/server/handshake"
	"github.com/ctrlplane/pilot/copilot/server/ratelimit"
	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/fips"
	"github.com/ctrlplane/pilot/internal/status"
	"github.com/ctrlplane/pilot/internal/unixsocket"
	"github.com/ctrlplane/pilot/internal/watchdog"
)

// adminSocket is the name of the socket in the store's directory on which a server takes
// commands of users that can read the store.
const adminSocket = "admin.sock"

// shutdownTimeout is how long requests in progress may take when a server stops.
const shutdownTimeout = 10 * time.Second

// Serve answers requests until ctx is done, then finishes those in progress. On SIGHUP it
// reloads its policy and reopens its audit log.
func Serve(ctx context.Context, conf Config) error {
	if err := conf.check(); err != nil {
		return exit.UsageError(err)
	}
	if err := conf.checkListen(); err != nil {
		return exit.UsageError(err)
	}
	var tlsConfig *tls.Config
	var clients *certfile.Authorities
	if conf.TLSClientCA != "" {
		var err error
		if clients, err = certfile.LoadAuthorities(conf.TLSClientCA); err != nil {
			return fmt.Errorf("TLS: CA of the clients: %w", err)
		}
	}
	if conf.hasTLS() {
		shown, err := pki.Served(conf.TLSCert, conf.TLSKey)
		if err != nil {
			return fmt.Errorf("TLS: certificate: %w", err)
		}
		if tlsConfig, err = certfile.ServerOf(shown, clients, len(conf.Issuers) > 0); err != nil {
			return fmt.Errorf("TLS: %w", err)
		}
	}
	b, err := closedBroker(conf)
	if err != nil {
		return err
	}
	defer b.close()
	b.callers.Clients = clients
	if b.nodeCA, err = newNodeCA(conf); err != nil {
		return err
	}
	if err := b.tryOpen(ctx, conf); err != nil {
		return err
	}
	b.policyRead()
	b.metrics.registry.MustRegister(status.Certificates("copilot_cert_not_after_seconds", func() map[string]string {
		return map[string]string{"tls-cert": conf.TLSCert, "tls-client-ca": conf.TLSClientCA, "node-ca": conf.NodeCA, "public-keys-cert": conf.PublicKeysCert}
	}))

	// Before it listens: without a handler, SIGHUP would end it.
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	s := &server{broker: b, turns: handshake.NewTurns(b.metrics.shed), connections: &ratelimit.Connections{Refused: b.metrics.refused}}
	defer s.closeListeners()
	if err := s.listen(conf, tlsConfig); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	for _, l := range s.listeners {
		s.serve(ctx, g, l)
	}
	g.Go(func() error {
		if err := b.awaitOpen(ctx, conf); err != nil || ctx.Err() != nil {
			return err
		}
		g.Go(func() error {
			b.heads.run(ctx)
			return nil
		})
		g.Go(func() error {
			b.master.run(ctx, b)
			return nil
		})
		b.tend(ctx, hangup)
		return nil
	})
	g.Go(func() error {
		b.audit.Run(ctx)
		return nil
	})
	g.Go(func() error {
		watchdog.Run(ctx, adminOf(conf.Dir).alive)
		return nil
	})
	if mode := fips.Describe(); mode != "" {
		logrus.Info(mode)
	}
	warn(conf)
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		logrus.WithError(err).Warn("can't notify systemd that copilot is ready")
	}
	return g.Wait()
}

// warn logs what is dangerous, and settings that are probably missing.
func warn(conf Config) {
	for _, address := range conf.Listen {
		isUnix := strings.HasPrefix(address, "unix://")
		logrus.WithFields(logrus.Fields{"listen": address, "tls": !isUnix && conf.hasTLS(), "dir": conf.Dir}).Info("copilot serves")
		if !isUnix && !conf.hasTLS() {
			logrus.WithField("listen", address).Warn("EVERY USER OF THIS MACHINE CAN READ EVERY KEK: TLS is off (--insecure-loopback)")
		}
	}
	if conf.Policy == "" && (conf.hasTLS() || len(conf.Issuers) > 0) {
		logrus.Warn("no policy: only root and copilot's own user may use KEKs, over unix sockets: set --policy")
	}
}

// server is a broker and its listeners.
type server struct {
	*broker
	turns       *handshake.Turns
	connections *ratelimit.Connections
	listeners   []listener
}

type listener struct {
	net.Listener
	handler http.Handler
}

func (s *server) closeListeners() {
	for _, l := range s.listeners {
		l.Close()
	}
}

// listen opens all listeners, those of the API last.
func (s *server) listen(conf Config, tlsConfig *tls.Config) error {
	admin, err := unixsocket.Listen(filepath.Join(conf.Dir, adminSocket))
	if err != nil {
		return fmt.Errorf("admin socket: %w", err)
	}
	public := http.NewServeMux()
	status.Health(public, s.ready)
	public.Handle("GET /metrics", s.metrics.handler())
	s.listeners = append(s.listeners, listener{admin, newAdminAPI(s.broker)})
	if conf.MetricsListen != "" {
		l, err := net.Listen("tcp", conf.MetricsListen)
		if err != nil {
			return fmt.Errorf("metrics-listen: %w", err)
		}
		s.listeners = append(s.listeners, listener{Listener: l, handler: public})
	}
	for _, address := range conf.Listen {
		l := listener{handler: newAPI(s.broker)}
		if path, ok := strings.CutPrefix(address, "unix://"); ok {
			if l.Listener, err = unixsocket.Listen(path); err == nil {
				l.Listener = s.connections.Listener(l.Listener)
				mode, _ := conf.socketMode()
				err = os.Chmod(path, mode)
			}
		} else if l.Listener, err = net.Listen("tcp", address); err == nil {
			l.Listener = s.connections.Listener(l.Listener)
			if tlsConfig != nil {
				l.Listener = s.turns.Listener(l.Listener, tlsConfig, s.handshakeFailed)
			} else {
				l.handler = forLoopback(l.handler, s.broker)
			}
		}
		if l.Listener != nil {
			s.listeners = append(s.listeners, l)
		}
		if err != nil {
			return fmt.Errorf("listen on %s: %w", address, err)
		}
	}
	return nil
}

// serve adds to g a server that answers on l until ctx is done.
func (s *server) serve(ctx context.Context, g *errgroup.Group, l listener) {
	h := &http.Server{
		Handler: l.handler,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return ratelimit.OnConnection(caller.OnConnection(ctx, c), c)
		},
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       20 * time.Second,
		WriteTimeout:      20 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    32 << 10,
		ErrorLog:          log.New(warnings{}, "", 0),

		DisableGeneralOptionsHandler: true,
	}
	g.Go(func() error {
		if err := h.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		s.stopping.Store(true)
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		if err := h.Shutdown(stop); err != nil {
			return h.Close()
		}
		return nil
	})
}

// warnings logs what [http.Server] reports.
type warnings struct{}

func (warnings) Write(b []byte) (int, error) {
	logrus.Warn(strings.TrimSpace(string(b)))
	return len(b), nil
}

// handshakeFailed logs and audits a connection whose TLS handshake failed.
func (b *broker) handshakeFailed(f handshake.Failure) {
	fields := logrus.WithError(f.Err).WithField("from", f.From)
	const message = "TLS handshake failed"
	if f.Silent() {
		fields.Debug(message)
		return
	}
	e := audit.Entry{Action: "connect", Who: caller.Anonymous, From: f.From, Verdict: audit.Failed, Reason: f.Err.Error()}
	if f.Denied {
		e.Verdict = audit.Denied
	}
	written, err := b.audit.Connection(e, errors.Is(f.Err, handshake.ErrOverload))
	if written {
		fields.Warn(message)
	}
	if err != nil {
		logrus.WithError(err).Error("can't audit a failed TLS handshake")
	}
}
