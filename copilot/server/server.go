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
	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/status"
	"github.com/ctrlplane/pilot/internal/unixsocket"
	"github.com/ctrlplane/pilot/internal/watchdog"
)

// adminSocket is the name of the socket in the store's directory on which a
// server takes the commands of whoever may read the store.
const adminSocket = "admin.sock"

// stopWithin is how long requests under way may take when a server stops.
const stopWithin = 10 * time.Second

// Serve answers requests until ctx is done, then finishes those under way. It
// reads its policy again, and opens its audit log again, on SIGHUP.
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
		var err error
		if tlsConfig, err = certfile.Server(conf.TLSCert, conf.TLSKey, clients, len(conf.Issuers) > 0); err != nil {
			return fmt.Errorf("TLS: %w", err)
		}
	}
	b, err := closedBroker(conf)
	if err != nil {
		return err
	}
	defer b.close()
	b.clients = clients
	if b.nodeCA, err = newNodeCA(conf); err != nil {
		return err
	}
	if err := b.tryOpen(ctx, conf); err != nil {
		return err
	}
	b.policyRead()
	b.metrics.registry.MustRegister(status.Certificates("copilot_cert_not_after_seconds", func() map[string]string {
		return map[string]string{"tls-cert": conf.TLSCert, "tls-client-ca": conf.TLSClientCA, "node-ca": conf.NodeCA}
	}))

	s := &server{broker: b, handshakes: newHandshakes(b.metrics.shed), connections: &connections{refused: b.metrics.refused}, errorLog: log.New(serverLog{b}, "", 0)}
	defer s.closeListeners()
	if err := s.listen(conf, tlsConfig); err != nil {
		return err
	}
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
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
		b.tend(ctx, hangup)
		return nil
	})
	g.Go(func() error {
		b.refusals.run(ctx)
		return nil
	})
	g.Go(func() error {
		watchdog.Run(ctx, adminOf(conf.Dir).alive)
		return nil
	})
	warn(conf)
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		logrus.WithError(err).Warn("systemd not told that copilot serves")
	}
	return g.Wait()
}

// warn says loudly what is dangerous, and what is not set but probably meant.
func warn(conf Config) {
	for _, address := range conf.Listen {
		isUnix := strings.HasPrefix(address, "unix://")
		logrus.WithFields(logrus.Fields{"listen": address, "tls": !isUnix && conf.hasTLS(), "dir": conf.Dir}).Info("copilot serves")
		if !isUnix && !conf.hasTLS() {
			logrus.WithField("listen", address).Warn("EVERY USER OF THIS MACHINE CAN READ EVERY KEK: there is no TLS (--insecure-loopback)")
		}
	}
	if conf.Policy == "" && (conf.hasTLS() || len(conf.Issuers) > 0) {
		logrus.Warn("there is no policy, so only root and copilot's own user may use KEKs, over unix sockets: give --policy")
	}
}

// server is what listens.
type server struct {
	*broker
	handshakes  *handshakes
	connections *connections
	errorLog    *log.Logger
	listeners   []listener
}

type listener struct {
	net.Listener
	handler http.Handler
	admin   bool
}

func (s *server) closeListeners() {
	for _, l := range s.listeners {
		l.Close()
	}
}

// listen opens all listeners, those with the API last.
func (s *server) listen(conf Config, tlsConfig *tls.Config) error {
	admin, err := unixsocket.Listen(filepath.Join(conf.Dir, adminSocket))
	if err != nil {
		return fmt.Errorf("admin socket: %w", err)
	}
	public := http.NewServeMux()
	status.Health(public, s.ready)
	public.Handle("GET /metrics", s.metrics.handler())
	s.listeners = append(s.listeners, listener{admin, newAdminAPI(s.broker), true})
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
				mode, _ := conf.socketMode()
				err = os.Chmod(path, mode)
			}
		} else if l.Listener, err = net.Listen("tcp", address); err == nil {
			if tlsConfig != nil {
				l.Listener = s.handshakes.listener(l.Listener, tlsConfig)
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
			if ctx = withPeer(ctx, c); l.admin {
				return ctx
			}
			return s.connections.opened(ctx, c)
		},
		ConnState: func(c net.Conn, state http.ConnState) {
			if state == http.StateClosed {
				s.connections.closed(c)
			}
		},
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       20 * time.Second,
		WriteTimeout:      20 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    32 << 10,
		ErrorLog:          s.errorLog,

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
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopWithin)
		defer cancel()
		if err := h.Shutdown(stop); err != nil {
			return h.Close()
		}
		return nil
	})
}

// serverLog takes the lines that [http.Server] logs: to the log and, those on
// connections that were refused for their certificate, to the audit log.
type serverLog struct{ *broker }

func (l serverLog) Write(b []byte) (int, error) {
	line := strings.TrimSpace(string(b))
	refused, ok := strings.CutPrefix(line, "http: TLS handshake error from ")
	from, reason, _ := strings.Cut(refused, ": ")
	switch {
	case !ok:
		logrus.Warn(line)
		return len(b), nil
	case reason == "EOF": // a probe that said nothing
		logrus.Debug(line)
		return len(b), nil
	}
	e := audit.Entry{Action: "connect", Who: anonymous, From: from, Verdict: audit.Failed, Reason: reason}
	if strings.Contains(reason, "certificate") {
		e.Verdict = audit.Denied
	}
	caller, many := network(from), reason == errOverload.Error()
	if many { // those come from many at once
		caller = reason
	}
	if !l.refusals.note(caller, e, many) {
		return len(b), nil
	}
	logrus.Warn(line)
	if l.opened.Load() {
		if err := l.audit.Write(e); err != nil {
			logrus.WithError(err).Error("refused connection not audited")
		}
	}
	return len(b), nil
}
