// Package copilot is a key broker: it keeps key encryption keys (KEKs), hands
// them out over HTTP or wraps and unwraps with them, and writes down each
// request in an audit log.
package copilot

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"

	"github.com/ctrlplane/pilot/certfile"
	"github.com/ctrlplane/pilot/unixsocket"
)

// adminSocket is the name of the socket in the store's directory on which a
// server takes the commands of whoever may read the store.
const adminSocket = "admin.sock"

// stopWithin is how long requests under way may take when a server stops.
const stopWithin = 10 * time.Second

// Config says where a server keeps things and where it answers.
type Config struct {
	// Dir holds the store, the audit log and the admin socket.
	Dir string
	// Listen are addresses: unix:///PATH, of mode 0600, or HOST:PORT.
	Listen []string
	// TLSCert, TLSKey and TLSClientCA are PEM files. An address that is
	// neither a unix socket nor loopback needs them, and clients there need
	// a certificate from TLSClientCA.
	TLSCert, TLSKey, TLSClientCA string
	// InsecureLoopback allows a loopback address without TLS.
	InsecureLoopback bool
	// AuditLog is a file, or "-" for standard output. Default: audit.log
	// in Dir.
	AuditLog string
}

// Serve answers requests until ctx is done, then finishes those under way.
func Serve(ctx context.Context, conf Config) error {
	tlsConfig, err := conf.tls()
	if err != nil {
		return err
	}
	if err := conf.check(tlsConfig != nil); err != nil {
		return err
	}
	store, err := OpenStore(conf.Dir)
	if err != nil {
		return err
	}
	defer store.Close()
	audit, err := OpenAuditLog(conf.auditLog())
	if err != nil {
		return err
	}
	defer audit.Close()

	admin, err := unixsocket.Listen(filepath.Join(conf.Dir, adminSocket))
	if err != nil {
		return fmt.Errorf("admin socket: %w", err)
	}
	listeners := []net.Listener{admin}
	defer func() {
		for _, l := range listeners {
			l.Close()
		}
	}()
	for _, address := range conf.Listen {
		l, err := listen(address, tlsConfig)
		if err != nil {
			return fmt.Errorf("listen on %s: %w", address, err)
		}
		listeners = append(listeners, l)
		_, isTCP := l.Addr().(*net.TCPAddr)
		logrus.WithFields(logrus.Fields{"listen": l.Addr().String(), "tls": isTCP && tlsConfig != nil, "dir": conf.Dir}).Info("copilot serves")
		if isTCP && tlsConfig == nil {
			logrus.WithField("listen", l.Addr().String()).Warn("EVERY USER OF THIS MACHINE CAN READ EVERY KEK: there is no TLS (--insecure-loopback)")
		}
	}

	g, ctx := errgroup.WithContext(ctx)
	errorLog := log.New(serverLog{audit}, "", 0)
	serve(ctx, g, admin, newAdminAPI(store, audit), errorLog)
	for _, l := range listeners[1:] {
		handler := newAPI(store, audit)
		if _, isTCP := l.(*net.TCPListener); isTCP {
			handler = forLoopback(handler, audit) // there is no TLS
		}
		serve(ctx, g, l, handler, errorLog)
	}
	return g.Wait()
}

// serverLog takes the lines that [http.Server] logs: to the log and, those on
// connections that were refused for their certificate, to the audit log.
type serverLog struct{ audit *AuditLog }

func (l serverLog) Write(b []byte) (int, error) {
	line := strings.TrimSpace(string(b))
	logrus.Warn(line)
	refused, ok := strings.CutPrefix(line, "http: TLS handshake error from ")
	from, reason, _ := strings.Cut(refused, ": ")
	if ok && reason != "EOF" { // a probe that said nothing
		e := Entry{Action: "connect", Who: "anonymous", From: from, Verdict: verdictFailed, Reason: reason}
		if strings.Contains(reason, "certificate") {
			e.Verdict = verdictDenied
		}
		err := l.audit.Write(e)
		if err != nil {
			logrus.WithError(err).Error("refused connection not audited")
		}
	}
	return len(b), nil
}

func (c Config) auditLog() string {
	if c.AuditLog != "" {
		return c.AuditLog
	}
	return filepath.Join(c.Dir, "audit.log")
}

// tls returns the TLS that the configuration asks for, or nil.
func (c Config) tls() (*tls.Config, error) {
	if c.TLSCert == "" && c.TLSKey == "" && c.TLSClientCA == "" {
		return nil, nil
	}
	if c.TLSCert == "" || c.TLSKey == "" || c.TLSClientCA == "" {
		return nil, errors.New("--tls-cert, --tls-key and --tls-client-ca go together")
	}
	pair, err := certfile.Load(c.TLSCert, c.TLSKey)
	if err != nil {
		return nil, fmt.Errorf("--tls-cert: %w", err)
	}
	clients, err := certfile.Pool(c.TLSClientCA)
	if err != nil {
		return nil, fmt.Errorf("--tls-client-ca: %w", err)
	}
	return &tls.Config{
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return pair.Certificate(), nil },
		ClientCAs:      clients,
		ClientAuth:     tls.RequireAndVerifyClientCert,
		MinVersion:     tls.VersionTLS12,
	}, nil
}

// check refuses addresses at which KEKs would be there for everybody.
func (c Config) check(hasTLS bool) error {
	if len(c.Listen) == 0 {
		return errors.New("nowhere to listen: give --listen, as in --listen unix:///run/copilot/copilot.sock")
	}
	for _, address := range c.Listen {
		if path, ok := strings.CutPrefix(address, "unix://"); ok {
			if !filepath.IsAbs(path) {
				return fmt.Errorf("--listen %s: a unix socket has an absolute path, as in unix:///run/copilot/copilot.sock", address)
			}
			continue
		}
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			return fmt.Errorf("--listen %s: it is neither unix:///PATH nor HOST:PORT", address)
		}
		switch {
		case hasTLS:
		case !isLoopback(host):
			return fmt.Errorf("--listen %s: other machines reach this, so it needs --tls-cert, --tls-key and --tls-client-ca", address)
		case !c.InsecureLoopback:
			return fmt.Errorf("--listen %s: every user of this machine would get every KEK: use a unix socket, TLS, or --insecure-loopback", address)
		}
	}
	return nil
}

// isLoopback reports whether host is this machine.
func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

func listen(address string, tlsConfig *tls.Config) (net.Listener, error) {
	if path, ok := strings.CutPrefix(address, "unix://"); ok {
		return unixsocket.Listen(path)
	}
	l, err := net.Listen("tcp", address)
	if err != nil || tlsConfig == nil {
		return l, err
	}
	return tls.NewListener(l, tlsConfig), nil
}

// serve adds to g a server that answers on l until ctx is done.
func serve(ctx context.Context, g *errgroup.Group, l net.Listener, h http.Handler, errorLog *log.Logger) {
	s := &http.Server{
		Handler:           h,
		ConnContext:       withPeer,
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       20 * time.Second,
		WriteTimeout:      20 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          errorLog,

		DisableGeneralOptionsHandler: true,
	}
	g.Go(func() error {
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopWithin)
		defer cancel()
		if err := s.Shutdown(stop); err != nil {
			return s.Close()
		}
		return nil
	})
}
