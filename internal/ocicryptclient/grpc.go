package ocicryptclient

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"slices"
	"strings"

	keyproviderconfig "github.com/containers/ocicrypt/config/keyprovider-config"

	"github.com/ctrlplane/pilot/internal/layerbudget"
	"github.com/ctrlplane/pilot/internal/protofield"
)

// server is a gRPC server whose methods take and return one message each:
// https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
type server struct {
	target           string // as it was given
	network, address string
	host             string                     // that its certificate has to be for
	tls              *keyproviderconfig.GrpcTLS // nil: none
}

// newServer returns the server at a target as gRPC names them
// (https://github.com/grpc/grpc/blob/master/doc/naming.md): unix:PATH,
// unix:///PATH, unix-abstract:NAME, HOST:PORT, dns:HOST:PORT or dns:///HOST:PORT,
// or with passthrough for dns.
func newServer(target string, conf *keyproviderconfig.GrpcTLS) (*server, error) {
	s := &server{target: target, network: "unix", host: "localhost", tls: conf}
	u, err := url.Parse(target)
	if err != nil || !slices.Contains([]string{"unix", "unix-abstract", "dns", "passthrough"}, u.Scheme) {
		u = &url.URL{Opaque: target}
	}
	place := cmp.Or(u.Path, u.Opaque)
	switch {
	case u.Host != "":
		return nil, fmt.Errorf("grpc %q: an authority (%s) is not supported: use %s:///%s", target, u.Host, u.Scheme, strings.TrimPrefix(place, "/"))
	case place == "":
		return nil, fmt.Errorf("grpc %q names no place", target)
	case u.Scheme == "unix":
		s.address = place
		return s, nil
	case u.Scheme == "unix-abstract":
		s.address = "@" + place
		return s, nil
	}
	s.address = strings.TrimPrefix(place, "/")
	s.network = "tcp"
	host, port, err := net.SplitHostPort(s.address)
	if err != nil {
		// gRPC's default.
		if host, port, err = net.SplitHostPort(s.address + ":443"); err != nil || u.Scheme == "" {
			return nil, fmt.Errorf("grpc %q is not unix:///PATH or HOST:PORT", target)
		}
	}
	s.host = cmp.Or(host, "localhost")
	s.address = net.JoinHostPort(s.host, port)
	return s, nil
}

// authority returns what a request says whom it is for.
func (s *server) authority() string {
	switch {
	case s.tls != nil && s.tls.ServerName != "":
		return s.tls.ServerName
	case s.network == "unix":
		return "localhost"
	}
	return s.address
}

// call calls a method whose messages have one field, the first, of type bytes.
func (s *server) call(ctx context.Context, method string, input []byte) ([]byte, error) {
	message := protofield.AppendField(nil, 1, input)
	answer, err := s.unary(ctx, method, message)
	if errors.Is(err, errNoAnswer) {
		answer, err = s.unary(ctx, method, message) // as gRPC does: once
	}
	clear(message)
	if err == nil {
		answer, err = protofield.Field(answer, 1)
	}
	if status := new(statusError); err != nil && !errors.As(err, &status) {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if errors.Is(err, fs.ErrPermission) {
			err = fmt.Errorf("%w: other users than the daemon's name pilot as a cmd in their ocicrypt.conf, with a pilot.toml of their own", err)
		}
		return nil, fmt.Errorf("key provider at %s: %w", s.target, err)
	}
	return answer, err
}

// messageHeader is the size of what precedes a message: whether it is
// compressed, which it never is here, and its length.
const messageHeader = 5

// unary connects, makes one call and closes the connection. A key provider that
// was restarted, or a certificate that was replaced, makes no difference, then.
func (s *server) unary(ctx context.Context, method string, message []byte) ([]byte, error) {
	raw, err := new(net.Dialer).DialContext(ctx, s.network, s.address)
	if err != nil {
		return nil, err
	}
	defer raw.Close()
	defer context.AfterFunc(ctx, func() { raw.Close() })()
	conn, scheme := raw, "http"
	if s.tls != nil {
		conf, err := tlsConfig(s.tls, s.host)
		if err != nil {
			return nil, err
		}
		secured := tls.Client(raw, conf)
		if err := secured.HandshakeContext(ctx); err != nil {
			return nil, err
		}
		if secured.ConnectionState().NegotiatedProtocol != "h2" {
			return nil, errors.New("it does not speak HTTP/2")
		}
		conn, scheme = secured, "https"
	}
	body := binary.BigEndian.AppendUint32(make([]byte, 1, messageHeader+len(message)), uint32(len(message)))
	body = append(body, message...)
	defer clear(body)
	header := []field{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: scheme}, {Name: ":path", Value: method}, {Name: ":authority", Value: s.authority()},
		{Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"}, {Name: "user-agent", Value: "pilot"},
	}
	if layer := layerbudget.ID(ctx); layer != "" {
		header = append(header, field{Name: layerbudget.Header, Value: layer})
	}
	resp, err := roundTrip(conn, header, body)
	if err != nil {
		return nil, err
	}
	if status, kind := resp.header[":status"], resp.header["content-type"]; status != "200" || !strings.HasPrefix(kind, "application/grpc") {
		return nil, fmt.Errorf("it does not speak gRPC: HTTP status %.10q, content type %.60q", status, kind)
	}
	if code := resp.header["grpc-status"]; code != "0" {
		return nil, newStatusError(code, resp.header["grpc-message"])
	}
	answer := resp.body
	if len(answer) < messageHeader || answer[0] != 0 || int(binary.BigEndian.Uint32(answer[1:])) != len(answer)-messageHeader {
		return nil, errors.New("its answer is not one gRPC message")
	}
	return answer[messageHeader:], nil
}

// statusError is what the key provider says is wrong.
type statusError struct{ code, message string }

func (e *statusError) Error() string { return e.message }

// Is reports whether it is [ErrDenied].
func (e *statusError) Is(target error) bool {
	return target == ErrDenied && (e.code == notFound || e.code == permissionDenied)
}

// gRPC's status codes: https://grpc.io/docs/guides/status-codes/.
const (
	notFound         = "5"
	permissionDenied = "7"
)

func newStatusError(code, message string) error {
	if code == "" {
		return errors.New("its answer ends without a status")
	}
	if s, err := url.PathUnescape(message); err == nil {
		message = s
	}
	if message == "" {
		message = "the key provider says gRPC status " + code
	}
	return &statusError{code, strings.ToValidUTF8(message, "\uFFFD")}
}
