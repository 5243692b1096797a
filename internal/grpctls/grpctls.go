// Package grpctls is TLS for gRPC servers whose clients show a certificate. Each call
// counts by the CAs that are trusted when it is made, also on a connection that is older.
package grpctls

import (
	"context"
	"errors"
	"fmt"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/ctrlplane/pilot/internal/certfile"
)

// ServerOptions returns the options of a server that shows the pair of certFile and
// keyFile, and whose clients need a certificate of a CA in caFile. All are PEM files that
// may be replaced. Unary calls of a client whose certificate has expired, or whose CA is
// no longer in caFile, fail with [codes.Unauthenticated].
func ServerOptions(certFile, keyFile, caFile string) ([]grpc.ServerOption, error) {
	clients, err := certfile.LoadAuthorities(caFile)
	if err != nil {
		return nil, fmt.Errorf("CA of the clients: %w", err)
	}
	conf, err := certfile.Server(certFile, keyFile, clients, false)
	if err != nil {
		return nil, err
	}
	return []grpc.ServerOption{
		grpc.Creds(serverCredentials{credentials.NewTLS(conf)}),
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if err := verify(ctx, clients); err != nil {
				return nil, status.Error(codes.Unauthenticated, err.Error())
			}
			return next(ctx, req)
		}),
	}, nil
}

// serverCredentials remember for each connection what verifying its client came to.
type serverCredentials struct {
	credentials.TransportCredentials
}

// connection is what is known of one connection.
type connection struct {
	credentials.TLSInfo
	client *certfile.Verified
}

func (c serverCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ServerHandshake(conn)
	if t, ok := info.(credentials.TLSInfo); ok {
		info = connection{t, new(certfile.Verified)}
	}
	return conn, info, err
}

func (c serverCredentials) Clone() credentials.TransportCredentials {
	return serverCredentials{c.TransportCredentials.Clone()}
}

// verify verifies the client's certificate by the CAs that are trusted now.
func verify(ctx context.Context, clients *certfile.Authorities) error {
	var c connection
	if p, ok := peer.FromContext(ctx); ok {
		c, _ = p.AuthInfo.(connection)
	}
	if c.client == nil || len(c.State.PeerCertificates) == 0 {
		return errors.New("the certificate was not verified")
	}
	if _, err := c.client.Verify(clients, c.State.PeerCertificates); err != nil {
		return fmt.Errorf("the certificate is no longer good: get one from a CA that is in tls-client-ca now: %w", err)
	}
	return nil
}
