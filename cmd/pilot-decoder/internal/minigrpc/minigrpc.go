// Package minigrpc calls key providers over gRPC without the packages of gRPC, whose
// initialization takes longer than decrypting a small layer.
package minigrpc

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"

	"github.com/ctrlplane/pilot/internal/layerbudget"
	"github.com/ctrlplane/pilot/internal/protofield"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
)

// maxAnswer bounds an answer, in bytes.
const maxAnswer = ocicryptclient.MaxAnswer

// messageHeader is the size of what precedes a message: whether it is compressed, which
// it never is here, and its length.
const messageHeader = 5

// Call is an [ocicryptclient.Transport].
// The protocol is https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
func Call(ctx context.Context, server *ocicryptclient.Server, method string, request []byte) ([]byte, error) {
	conn, scheme, err := dial(ctx, server)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	message := protofield.AppendField(nil, 1, request)
	defer clear(message)
	body := binary.BigEndian.AppendUint32(make([]byte, 1, messageHeader+len(message)), uint32(len(message)))
	body = append(body, message...)
	defer clear(body)
	header := []field{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: scheme}, {Name: ":path", Value: method}, {Name: ":authority", Value: server.Authority()},
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
		return nil, statusError(code, resp.header["grpc-message"])
	}
	answer := resp.body
	if len(answer) < messageHeader || answer[0] != 0 || int(binary.BigEndian.Uint32(answer[1:])) != len(answer)-messageHeader {
		return nil, errors.New("its answer is not one gRPC message")
	}
	return protofield.Field(answer[messageHeader:], 1)
}

// dial connects, and returns the connection with the scheme of its URLs.
func dial(ctx context.Context, server *ocicryptclient.Server) (net.Conn, string, error) {
	conf, err := server.TLS()
	if err != nil {
		return nil, "", err
	}
	conn, err := new(net.Dialer).DialContext(ctx, server.Network, server.Address)
	if err != nil || conf == nil {
		return conn, "http", err
	}
	secured := tls.Client(conn, conf)
	if err = secured.HandshakeContext(ctx); err == nil && secured.ConnectionState().NegotiatedProtocol != "h2" {
		err = errors.New("it does not speak HTTP/2")
	}
	if err != nil {
		conn.Close()
		return nil, "", err
	}
	return secured, "https", nil
}

// statusError returns the error of a status and its percent-encoded message.
func statusError(code, message string) error {
	n, err := strconv.ParseUint(code, 10, 32)
	if err != nil {
		return errors.New("its answer ends without a status")
	}
	if s, err := url.PathUnescape(message); err == nil {
		message = s
	}
	return &ocicryptclient.StatusError{Code: uint32(n), Message: strings.ToValidUTF8(message, "\uFFFD")}
}
