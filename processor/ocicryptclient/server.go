package ocicryptclient

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"

	keyproviderconfig "github.com/containers/ocicrypt/config/keyprovider-config"

	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/processor"
)

// Transport calls a gRPC method of a server whose request and response are messages with
// one field, the first, of type bytes, and returns that of the response. It makes a
// connection of its own, so a key provider that was restarted and a certificate that was
// replaced make no difference. It gives up when ctx is done.
//
// Its error is a [*StatusError] if the server answered with one, and wraps [ErrNoAnswer]
// if the server closed the connection before it answered.
type Transport func(ctx context.Context, server *Server, method string, request []byte) (response []byte, err error)

// ErrNoAnswer is the error of a connection that was closed without an answer, as by a
// server that is being restarted.
var ErrNoAnswer = errors.New("it closed the connection")

// StatusError is the error that a gRPC server answered with.
type StatusError struct {
	Code    uint32 // https://grpc.io/docs/guides/status-codes/
	Message string
}

// Error returns the server's message.
func (e *StatusError) Error() string {
	if e.Message == "" {
		return fmt.Sprintf("the key provider answered with gRPC status %d", e.Code)
	}
	return e.Message
}

// Is reports whether target is [processor.ErrDenied] and the key provider refused, or
// [context.DeadlineExceeded] and it ran out of time, which it may notice before its caller does.
func (e *StatusError) Is(target error) bool {
	const deadlineExceeded, notFound, permissionDenied = 4, 5, 7
	return target == processor.ErrDenied && (e.Code == notFound || e.Code == permissionDenied) ||
		target == context.DeadlineExceeded && e.Code == deadlineExceeded
}

// Server is a gRPC server as the members grpc and grpc-tls of an ocicrypt.conf name it.
type Server struct {
	// Network and Address are those of [net.Dial].
	Network, Address string

	target string // as it was given
	host   string // that its certificate must be for
	tls    *keyproviderconfig.GrpcTLS
}

// newServer returns the server at a target as gRPC names them
// (https://github.com/grpc/grpc/blob/master/doc/naming.md): unix:PATH,
// unix:///PATH, unix-abstract:NAME, HOST:PORT, dns:HOST:PORT or dns:///HOST:PORT,
// or with passthrough for dns.
func newServer(target string, conf *keyproviderconfig.GrpcTLS) (*Server, error) {
	s := &Server{target: target, Network: "unix", host: "localhost", tls: conf}
	u, err := url.Parse(target)
	if err != nil || !slices.Contains([]string{"unix", "unix-abstract", "dns", "passthrough"}, u.Scheme) {
		u = &url.URL{Opaque: target}
	}
	endpoint := cmp.Or(u.Path, u.Opaque)
	switch {
	case u.Host != "":
		return nil, fmt.Errorf("grpc %q: an authority (%s) is not supported: use %s:///%s", target, u.Host, u.Scheme, strings.TrimPrefix(endpoint, "/"))
	case endpoint == "":
		return nil, fmt.Errorf("grpc %q has no address", target)
	case u.Scheme == "unix":
		s.Address = endpoint
		return s, nil
	case u.Scheme == "unix-abstract":
		s.Address = "@" + endpoint
		return s, nil
	}
	s.Network, s.Address = "tcp", strings.TrimPrefix(endpoint, "/")
	host, port, err := net.SplitHostPort(s.Address)
	if err != nil {
		// gRPC's default.
		if host, port, err = net.SplitHostPort(s.Address + ":443"); err != nil || u.Scheme == "" {
			return nil, fmt.Errorf("grpc %q is not unix:///PATH or HOST:PORT", target)
		}
	}
	s.host = cmp.Or(host, "localhost")
	s.Address = net.JoinHostPort(s.host, port)
	return s, nil
}

// Authority returns the :authority of a request.
func (s *Server) Authority() string {
	switch {
	case s.tls != nil && s.tls.ServerName != "":
		return s.tls.ServerName
	case s.Network == "unix":
		return "localhost"
	}
	return s.Address
}

// TLS returns the TLS configuration of a connection, from the files as they are now, or
// nil if connections are in plain text.
func (s *Server) TLS() (*tls.Config, error) {
	if s.tls == nil {
		return nil, nil
	}
	conf := &tls.Config{
		ServerName:         cmp.Or(s.tls.ServerName, s.host),
		InsecureSkipVerify: s.tls.InsecureSkipVerify,
		NextProtos:         []string{"h2"},
	}
	if s.tls.RootCAFile != "" {
		var err error
		if conf.RootCAs, err = certfile.Pool(s.tls.RootCAFile); err != nil {
			return nil, fmt.Errorf("root-ca-file: %w", err)
		}
	}
	if s.tls.CertFile != "" || s.tls.KeyFile != "" {
		pair, err := certfile.KeyPair(s.tls.CertFile, s.tls.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("cert-file and key-file: %w", err)
		}
		conf.Certificates = []tls.Certificate{pair}
	}
	return conf, nil
}
