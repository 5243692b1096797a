// Package transporttest tests transports of package ocicryptclient against gRPC's own
// server.
package transporttest

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	keyproviderconfig "github.com/containers/ocicrypt/config/keyprovider-config"
	pb "github.com/containers/ocicrypt/utils/keyprovider"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/ctrlplane/pilot/internal/certfile/certtest"
	"github.com/ctrlplane/pilot/internal/layerbudget"
	"github.com/ctrlplane/pilot/processor"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
)

// Run tests a transport.
func Run(t *testing.T, transport ocicryptclient.Transport) {
	s := suite{transport}
	for name, test := range map[string]func(*testing.T){
		"calls servers at targets of each kind":            s.targets,
		"returns the status that the server answers with":  s.statuses,
		"ends the request with its context":                s.cancels,
		"sends the layer":                                  s.sendsLayer,
		"fails where there is no gRPC server":              s.noServer,
		"reaches a server that was restarted":              s.restarts,
		"tries a second time if the connection is closed":  s.closed,
		"sends as much as the server's window allows":      s.windows,
		"checks certificates, and reads its own each time": s.certificates,
		"does not wait for a handshake past its context":   s.hangingHandshake,
	} {
		t.Run(name, test)
	}
}

type suite struct{ transport ocicryptclient.Transport }

// service is a key provider in gRPC's own code.
type service struct {
	pb.UnimplementedKeyProviderServiceServer
	waits     chan struct{}
	cancelled chan struct{}
	layer     []string // the header of the last request
}

func (s *service) WrapKey(ctx context.Context, in *pb.KeyProviderKeyWrapProtocolInput) (*pb.KeyProviderKeyWrapProtocolOutput, error) {
	s.layer = metadata.ValueFromIncomingContext(ctx, layerbudget.Header)
	return &pb.KeyProviderKeyWrapProtocolOutput{KeyProviderKeyWrapProtocolOutput: append([]byte("wrapped "), in.KeyProviderKeyWrapProtocolInput...)}, nil
}

func (s *service) UnWrapKey(ctx context.Context, in *pb.KeyProviderKeyWrapProtocolInput) (*pb.KeyProviderKeyWrapProtocolOutput, error) {
	switch op := string(in.KeyProviderKeyWrapProtocolInput); op {
	case "fail":
		return nil, status.Error(codes.PermissionDenied, "KEK \"team-ä\" 100%: no\nnever")
	case "fail silently":
		return nil, status.Error(codes.Internal, "")
	case "too much":
		return &pb.KeyProviderKeyWrapProtocolOutput{KeyProviderKeyWrapProtocolOutput: make([]byte, ocicryptclient.MaxAnswer)}, nil
	case "nothing":
		return &pb.KeyProviderKeyWrapProtocolOutput{}, nil
	case "wait":
		close(s.waits)
		<-ctx.Done()
		close(s.cancelled)
		return nil, ctx.Err()
	default:
		return nil, fmt.Errorf("asked to %q", op)
	}
}

func serve(t *testing.T, l net.Listener, options ...grpc.ServerOption) (*service, *grpc.Server) {
	t.Helper()
	s, server := &service{waits: make(chan struct{}), cancelled: make(chan struct{})}, grpc.NewServer(options...)
	pb.RegisterKeyProviderServiceServer(server, s)
	go server.Serve(l)
	t.Cleanup(server.Stop)
	return s, server
}

func listen(t *testing.T, network, address string) net.Listener {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// client is a client whose requests are no JSON.
type client struct{ *ocicryptclient.Client }

func (c client) WrapKey(ctx context.Context, input []byte) ([]byte, error) {
	return c.Forward(ctx, ocicryptclient.Wrap, input)
}

func (c client) UnwrapKey(ctx context.Context, input []byte) ([]byte, error) {
	return c.Forward(ctx, ocicryptclient.Unwrap, input)
}

func (s suite) client(t *testing.T, attrs keyproviderconfig.KeyProviderAttrs) client {
	t.Helper()
	c, err := ocicryptclient.New("", attrs, s.transport)
	if err != nil {
		t.Fatal(err)
	}
	return client{c}
}

func (s suite) at(t *testing.T, target string) client {
	t.Helper()
	return s.client(t, keyproviderconfig.KeyProviderAttrs{Grpc: target})
}

// works checks that the client gets answers of all sizes.
func works(t *testing.T, c client) {
	t.Helper()
	for _, size := range []int{0, 1, 20000, 70000, 3 << 20} {
		input := bytes.Repeat([]byte("x"), size)
		out, err := c.WrapKey(t.Context(), input)
		if err != nil || string(out) != "wrapped "+string(input) {
			t.Errorf("%d bytes: the answer has %d, %v", size, len(out), err)
		}
	}
}

func (s suite) targets(t *testing.T) {
	dir := t.TempDir()
	for target, l := range map[string]net.Listener{
		"unix://" + dir + "/a":                 listen(t, "unix", dir+"/a"),
		"unix:" + dir + "/b":                   listen(t, "unix", dir+"/b"),
		fmt.Sprintf("unix-abstract:%s/c", dir): listen(t, "unix", "@"+dir+"/c"),
		"":                                     listen(t, "tcp", "127.0.0.1:0"),
		"dns:":                                 listen(t, "tcp", "127.0.0.1:0"),
		"dns:///":                              listen(t, "tcp", "127.0.0.1:0"),
		"passthrough:///":                      listen(t, "tcp", "127.0.0.1:0"),
	} {
		if l.Addr().Network() == "tcp" {
			target += l.Addr().String()
		}
		serve(t, l)
		works(t, s.at(t, target))
	}
}

func (s suite) statuses(t *testing.T) {
	dir := t.TempDir()
	serve(t, listen(t, "unix", dir+"/s"))
	c := s.at(t, "unix://"+dir+"/s")
	for op, want := range map[string]struct {
		message string
		denied  bool
	}{
		"fail":          {"KEK \"team-ä\" 100%: no\nnever", true},
		"fail silently": {"the key provider answered with gRPC status 13", false},
	} {
		out, err := c.UnwrapKey(t.Context(), []byte(op))
		if err == nil || err.Error() != want.message || errors.Is(err, processor.ErrDenied) != want.denied || !errors.As(err, new(*ocicryptclient.StatusError)) {
			t.Errorf("%s: %q, %v", op, out, err)
		}
	}
	if out, err := c.UnwrapKey(t.Context(), []byte("too much")); err == nil {
		t.Errorf("an answer of %d bytes was accepted", len(out))
	}
	if out, err := c.UnwrapKey(t.Context(), []byte("nothing")); err != nil || len(out) > 0 {
		t.Errorf("nothing: %q, %v", out, err)
	}
}

func (s suite) cancels(t *testing.T) {
	dir := t.TempDir()
	server, _ := serve(t, listen(t, "unix", dir+"/s"))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		<-server.waits
		cancel()
	}()
	if _, err := s.at(t, "unix://"+dir+"/s").UnwrapKey(ctx, []byte("wait")); !errors.Is(err, context.Canceled) {
		t.Errorf("no answer: %v", err)
	}
	select {
	case <-server.cancelled:
	case <-time.After(time.Minute):
		t.Error("the request goes on after its context has ended")
	}
}

func (s suite) sendsLayer(t *testing.T) {
	dir := t.TempDir()
	server, _ := serve(t, listen(t, "unix", dir+"/s"))
	c := s.at(t, "unix://"+dir+"/s")
	ctx := layerbudget.With(t.Context())
	for _, test := range []struct {
		ctx  context.Context
		want string
	}{{ctx, layerbudget.ID(ctx)}, {t.Context(), ""}} {
		if _, err := c.WrapKey(test.ctx, nil); err != nil || strings.Join(server.layer, ",") != test.want {
			t.Errorf("layer %q, want %q, %v", server.layer, test.want, err)
		}
	}
}

func (s suite) noServer(t *testing.T) {
	for name, protocols := range map[string]func(*http.Protocols){
		"HTTP/2": func(p *http.Protocols) { p.SetUnencryptedHTTP2(true) },
		"HTTP/1": func(p *http.Protocols) { p.SetHTTP1(true) },
	} {
		l := listen(t, "tcp", "127.0.0.1:0")
		server := &http.Server{Handler: http.NotFoundHandler(), Protocols: new(http.Protocols)}
		protocols(server.Protocols)
		go server.Serve(l)
		t.Cleanup(func() { server.Close() })
		if _, err := s.at(t, l.Addr().String()).UnwrapKey(t.Context(), nil); err == nil || !strings.HasPrefix(err.Error(), "key provider at "+l.Addr().String()+": ") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.at(t, "unix:///nonexistent/s").WrapKey(t.Context(), nil); err == nil || err.Error() != "key provider at unix:///nonexistent/s: dial unix /nonexistent/s: connect: no such file or directory" {
		t.Errorf("nobody: %v", err)
	}
}

func (s suite) restarts(t *testing.T) {
	socket := t.TempDir() + "/s"
	c := s.at(t, "unix://"+socket)
	for range 3 {
		_, server := serve(t, listen(t, "unix", socket))
		works(t, c)
		server.Stop()
	}
	if _, err := c.WrapKey(t.Context(), nil); err == nil {
		t.Error("nobody is there: no error")
	}
}

func (s suite) closed(t *testing.T) {
	l := listen(t, "tcp", "127.0.0.1:0")
	first := make(chan error, 1)
	go func() {
		conn, err := l.Accept()
		if err == nil {
			err = conn.Close()
		}
		first <- err
		server := grpc.NewServer()
		pb.RegisterKeyProviderServiceServer(server, &service{})
		t.Cleanup(server.Stop)
		server.Serve(l)
	}()
	works(t, s.at(t, l.Addr().String()))
	if err := <-first; err != nil {
		t.Error(err)
	}
}

func (s suite) windows(t *testing.T) {
	l := listen(t, "tcp", "127.0.0.1:0")
	serve(t, l, grpc.StaticStreamWindowSize(65535), grpc.StaticConnWindowSize(65535))
	works(t, s.at(t, l.Addr().String()))
}

func (s suite) certificates(t *testing.T) {
	ca := certtest.NewAuthority(t)
	server, own := ca.Issue(t, x509.Certificate{}), ca.Issue(t, x509.Certificate{})
	pair, err := tls.LoadX509KeyPair(server.Cert, server.Key)
	if err != nil {
		t.Fatal(err)
	}
	l := listen(t, "tcp", "127.0.0.1:0")
	serve(t, l, grpc.Creds(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{pair}, ClientCAs: ca.Pool(), ClientAuth: tls.RequireAndVerifyClientCert,
	})))
	as := func(conf keyproviderconfig.GrpcTLS) keyproviderconfig.KeyProviderAttrs {
		return keyproviderconfig.KeyProviderAttrs{Grpc: l.Addr().String(), GrpcTLS: &conf}
	}
	works(t, s.client(t, as(keyproviderconfig.GrpcTLS{RootCAFile: ca.File, CertFile: own.Cert, KeyFile: own.Key})))
	works(t, s.client(t, as(keyproviderconfig.GrpcTLS{InsecureSkipVerify: true, CertFile: own.Cert, KeyFile: own.Key})))
	for want, conf := range map[string]keyproviderconfig.GrpcTLS{
		"unknown authority":    {CertFile: own.Cert, KeyFile: own.Key},
		"certificate required": {RootCAFile: ca.File},
		"wanted to match x":    {RootCAFile: ca.File, CertFile: own.Cert, KeyFile: own.Key, ServerName: "x"},
	} {
		if _, err := s.client(t, as(conf)).WrapKey(t.Context(), nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	// A certificate that is replaced serves from then on.
	rotated := s.client(t, as(keyproviderconfig.GrpcTLS{RootCAFile: ca.File, CertFile: own.Cert + ".new", KeyFile: own.Key}))
	if _, err := rotated.WrapKey(t.Context(), nil); err == nil {
		t.Error("no certificate yet: no error")
	}
	if err := os.Rename(own.Cert, own.Cert+".new"); err != nil {
		t.Fatal(err)
	}
	works(t, rotated)
	for want, conf := range map[string]keyproviderconfig.GrpcTLS{
		"root-ca-file: open /nonexistent":   {RootCAFile: "/nonexistent"},
		"holds no certificate":              {RootCAFile: own.Key},
		"cert-file and key-file: open : no": {KeyFile: own.Key},
	} {
		if _, err := s.client(t, as(conf)).WrapKey(t.Context(), nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

func (s suite) hangingHandshake(t *testing.T) {
	l := listen(t, "tcp", "127.0.0.1:0") // it accepts and never says a word
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	c := s.client(t, keyproviderconfig.KeyProviderAttrs{Grpc: l.Addr().String(), GrpcTLS: &keyproviderconfig.GrpcTLS{}})
	if _, err := c.WrapKey(ctx, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("no answer: %v", err)
	}
}
