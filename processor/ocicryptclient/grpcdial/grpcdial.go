// Package grpcdial calls key providers with gRPC's own client.
package grpcdial

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"strings"
	"sync/atomic"

	pb "github.com/containers/ocicrypt/utils/keyprovider"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/ctrlplane/pilot/internal/layerbudget"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
)

// certificateRequired is what crypto/tls calls the alert of a server that got no client
// certificate.
const certificateRequired = "certificate required"

// Call is an [ocicryptclient.Transport].
func Call(ctx context.Context, server *ocicryptclient.Server, method string, request []byte) ([]byte, error) {
	conf, err := server.TLS()
	if err != nil {
		return nil, err
	}
	var dialErr atomic.Pointer[error] // of the last attempt
	options := []grpc.DialOption{
		grpc.WithNoProxy(),
		grpc.WithUserAgent("pilot"),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, server.Network, server.Address)
			dialErr.Store(&err)
			return conn, err
		}),
	}
	var refused atomic.Bool // to show a certificate
	if conf != nil {
		if len(conf.Certificates) == 0 {
			conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				refused.Store(true)
				return new(tls.Certificate), nil
			}
		}
		options = append(options, grpc.WithTransportCredentials(credentials.NewTLS(conf)))
	} else {
		options = append(options, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority(server.Authority()))
	}
	conn, err := grpc.NewClient("passthrough:///"+server.Address, options...)
	if err != nil {
		return nil, err
	}
	defer conn.Close()

	if layer := layerbudget.ID(ctx); layer != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, layerbudget.Header, layer)
	}
	var header, trailer metadata.MD
	out := new(pb.KeyProviderKeyWrapProtocolOutput)
	err = conn.Invoke(ctx, method, &pb.KeyProviderKeyWrapProtocolInput{KeyProviderKeyWrapProtocolInput: request}, out, grpc.Header(&header), grpc.Trailer(&trailer))
	if err == nil {
		return out.GetKeyProviderKeyWrapProtocolOutput(), nil
	}
	if failed := dialErr.Load(); failed != nil && *failed != nil {
		return nil, *failed
	}
	s := status.Convert(err)
	if len(header)+len(trailer) == 0 {
		// gRPC's timer may end the call before the context's own does.
		switch s.Code() {
		case codes.DeadlineExceeded:
			return nil, context.DeadlineExceeded
		case codes.Canceled:
			return nil, context.Canceled
		}
		if refused.Load() && !strings.Contains(s.Message(), certificateRequired) {
			// In TLS 1.3 the connection may be gone before the server's alert is read.
			return nil, fmt.Errorf("%w: %s (%s: the server asks for a client certificate, and cert-file names none)", ocicryptclient.ErrNoAnswer, s.Message(), certificateRequired)
		}
		return nil, fmt.Errorf("%w: %s", ocicryptclient.ErrNoAnswer, s.Message())
	}
	return nil, &ocicryptclient.StatusError{Code: uint32(s.Code()), Message: s.Message()}
}
