package ocicryptclient

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
	"path/filepath"
	"strings"
	"testing"
	"time"

	keyproviderconfig "github.com/containers/ocicrypt/config/keyprovider-config"
	pb "github.com/containers/ocicrypt/utils/keyprovider"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/ctrlplane/pilot/internal/certfile/certtest"
)

// service is a key provider in gRPC's own code.
type service struct {
	pb.UnimplementedKeyProviderServiceServer
	cancelled chan struct{}
}

func (s *service) WrapKey(_ context.Context, in *pb.KeyProviderKeyWrapProtocolInput) (*pb.KeyProviderKeyWrapProtocolOutput, error) {
	return &pb.KeyProviderKeyWrapProtocolOutput{KeyProviderKeyWrapProtocolOutput: append([]byte("wrapped "), in.KeyProviderKeyWrapProtocolInput...)}, nil
}

func (s *service) UnWrapKey(ctx context.Context, in *pb.KeyProviderKeyWrapProtocolInput) (*pb.KeyProviderKeyWrapProtocolOutput, error) {
	switch op := string(in.KeyProviderKeyWrapProtocolInput); op {
	case "fail":
		return nil, status.Error(codes.PermissionDenied, "KEK \"team-ä\" 100%: no\nnever")
	case "fail silently":
		return nil, status.Error(codes.Internal, "")
	case "too much":
		return &pb.KeyProviderKeyWrapProtocolOutput{KeyProviderKeyWrapProtocolOutput: make([]byte, maxAnswer)}, nil
	case "nothing":
		return &pb.KeyProviderKeyWrapProtocolOutput{}, nil
	case "wait":
		<-ctx.Done()
		close(s.cancelled)
		return nil, ctx.Err()
	default:
		return nil, fmt.Errorf("asked to %q", op)
	}
}

func serve(t *testing.T, l net.Listener, options ...grpc.ServerOption) (*service, *grpc.Server) {
	t.Helper()
	s, server := &service{cancelled: make(chan struct{})}, grpc.NewServer(options...)
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

func newClient(t *testing.T, attrs keyproviderconfig.KeyProviderAttrs) *Client {
	t.Helper()
	c, err := New(attrs)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// works checks that the client gets answers of all sizes.
func works(t *testing.T, c *Client) {
	t.Helper()
	for _, size := range []int{0, 1, 20000, 70000, 3 << 20} {
		input := bytes.Repeat([]byte("x"), size)
		out, err := c.WrapKey(t.Context(), input)
		if err != nil || string(out) != "wrapped "+string(input) {
			t.Errorf("%d bytes: the answer has %d, %v", size, len(out), err)
		}
	}
}

func TestTargets(t *testing.T) {
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
		works(t, newClient(t, keyproviderconfig.KeyProviderAttrs{Grpc: target}))
	}
	for target, want := range map[string]string{
		"unix:relative/s":       "unix relative/s localhost",
		"unix:///dir/s%20p":     "unix /dir/s p localhost",
		"unix-abstract:///name": "unix @/name localhost",
		"DNS:///example.com:1":  "tcp example.com:1 example.com",
		"dns:/example.com:1":    "tcp example.com:1 example.com",
		"dns:///example.com":    "tcp example.com:443 example.com",
		":50051":                "tcp localhost:50051 localhost",
		"[::1]:50051":           "tcp [::1]:50051 ::1",
		"localhost:50051":       "tcp localhost:50051 localhost",
		"dns://8.8.8.8/a:1":     `grpc "dns://8.8.8.8/a:1": an authority (8.8.8.8) is not supported: use dns:///a:1`,
		"unix://run/s":          `grpc "unix://run/s": an authority (run) is not supported: use unix:///s`,
		"unix:":                 `grpc "unix:" names no place`,
		"example.com":           `grpc "example.com" is not unix:///PATH or HOST:PORT`,
	} {
		var got string
		if s, err := newServer(target, nil); err != nil {
			got = err.Error()
		} else {
			got = s.network + " " + s.address + " " + s.host
		}
		if got != want {
			t.Errorf("%s: %s, want %s", target, got, want)
		}
	}
}

func TestErrors(t *testing.T) {
	dir := t.TempDir()
	s, _ := serve(t, listen(t, "unix", dir+"/s"))
	c := newClient(t, keyproviderconfig.KeyProviderAttrs{Grpc: "unix://" + dir + "/s"})
	for op, want := range map[string]string{
		"fail":          "KEK \"team-ä\" 100%: no\nnever",
		"fail silently": "the key provider says gRPC status 13",
		"too much":      "key provider at unix://" + dir + "/s: it answers more than 4194304 bytes",
	} {
		if out, err := c.UnwrapKey(t.Context(), []byte(op)); err == nil || err.Error() != want {
			t.Errorf("%s: %q, %v", op, out, err)
		}
	}
	if out, err := c.UnwrapKey(t.Context(), []byte("nothing")); err != nil || len(out) > 0 {
		t.Errorf("nothing: %q, %v", out, err)
	}

	// The server learns that nobody waits any more.
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second) // in which it has to get there
	defer cancel()
	if _, err := c.UnwrapKey(ctx, []byte("wait")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("no answer: %v", err)
	}
	select {
	case <-s.cancelled:
	case <-time.After(time.Minute):
		t.Error("the request goes on after its context has ended")
	}

	for name, test := range map[string]struct {
		handler http.HandlerFunc
		want    string
	}{
		"not found":   {http.NotFound, `it does not speak gRPC: HTTP status "404", content type "text/plain`},
		"no gRPC":     {func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "hello") }, `it does not speak gRPC: HTTP status "200", content type "text/plain`},
		"no status":   {grpcAnswer("\x00\x00\x00\x00\x00", ""), "its answer ends without a status"},
		"no message":  {grpcAnswer("", "0"), "its answer is not one gRPC message"},
		"cut short":   {grpcAnswer("\x00\x00\x00\x00\x05\x0a", "0"), "its answer is not one gRPC message"},
		"compressed":  {grpcAnswer("\x01\x00\x00\x00\x02\x0a\x00", "0"), "its answer is not one gRPC message"},
		"two":         {grpcAnswer("\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", "0"), "its answer is not one gRPC message"},
		"no protobuf": {grpcAnswer("\x00\x00\x00\x00\x02\x0a\xff", "0"), "malformed protocol buffer"},
	} {
		l := listen(t, "tcp", "127.0.0.1:0")
		server := &http.Server{Handler: test.handler, Protocols: new(http.Protocols)}
		server.Protocols.SetUnencryptedHTTP2(true)
		go server.Serve(l)
		t.Cleanup(func() { server.Close() })
		_, err := newClient(t, keyproviderconfig.KeyProviderAttrs{Grpc: l.Addr().String()}).UnwrapKey(t.Context(), nil)
		if err == nil || !strings.Contains(err.Error(), "key provider at "+l.Addr().String()+": ") || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
	}
	l := listen(t, "tcp", "127.0.0.1:0")
	go http.Serve(l, http.NotFoundHandler()) // HTTP/1
	if _, err := newClient(t, keyproviderconfig.KeyProviderAttrs{Grpc: l.Addr().String()}).UnwrapKey(t.Context(), nil); err == nil {
		t.Error("an HTTP/1 server: no error")
	}
	if _, err := newClient(t, keyproviderconfig.KeyProviderAttrs{Grpc: "unix:///nonexistent/s"}).WrapKey(t.Context(), nil); err == nil || err.Error() != "key provider at unix:///nonexistent/s: dial unix /nonexistent/s: connect: no such file or directory" {
		t.Errorf("nobody: %v", err)
	}
}

// grpcAnswer answers with a body and a status in the trailer.
func grpcAnswer(body, status string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/grpc")
		fmt.Fprint(w, body)
		if status != "" {
			w.Header().Set(http.TrailerPrefix+"Grpc-Status", status)
		}
	}
}

// TestRestart asks a key provider that was restarted meanwhile.
func TestRestart(t *testing.T) {
	socket := t.TempDir() + "/s"
	c := newClient(t, keyproviderconfig.KeyProviderAttrs{Grpc: "unix://" + socket})
	for range 3 {
		_, server := serve(t, listen(t, "unix", socket))
		works(t, c)
		server.Stop()
	}
	if _, err := c.WrapKey(t.Context(), nil); err == nil {
		t.Error("nobody is there: no error")
	}
}

// TestNoAnswer asks a key provider that closes its first connection.
func TestNoAnswer(t *testing.T) {
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
	works(t, newClient(t, keyproviderconfig.KeyProviderAttrs{Grpc: l.Addr().String()}))
	if err := <-first; err != nil {
		t.Error(err)
	}
}

func TestTLS(t *testing.T) {
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
	works(t, newClient(t, as(keyproviderconfig.GrpcTLS{RootCAFile: ca.File, CertFile: own.Cert, KeyFile: own.Key})))
	works(t, newClient(t, as(keyproviderconfig.GrpcTLS{InsecureSkipVerify: true, CertFile: own.Cert, KeyFile: own.Key})))
	for want, conf := range map[string]keyproviderconfig.GrpcTLS{
		"unknown authority":    {CertFile: own.Cert, KeyFile: own.Key},
		"certificate required": {RootCAFile: ca.File},
		"wanted to match x":    {RootCAFile: ca.File, CertFile: own.Cert, KeyFile: own.Key, ServerName: "x"},
	} {
		if _, err := newClient(t, as(conf)).WrapKey(t.Context(), nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	// A certificate that is replaced serves from then on.
	rotated := newClient(t, as(keyproviderconfig.GrpcTLS{RootCAFile: ca.File, CertFile: own.Cert + ".new", KeyFile: own.Key}))
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
		if _, err := newClient(t, as(conf)).WrapKey(t.Context(), nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

// TestTLSHangs has a server accept and never say a word.
func TestTLSHangs(t *testing.T) {
	l := listen(t, "tcp", "127.0.0.1:0")
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	c := newClient(t, keyproviderconfig.KeyProviderAttrs{Grpc: l.Addr().String(), GrpcTLS: &keyproviderconfig.GrpcTLS{}})
	if _, err := c.WrapKey(ctx, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("no answer: %v", err)
	}
}

func TestCommand(t *testing.T) {
	dir := t.TempDir()
	command := func(script string) *Client {
		return newClient(t, keyproviderconfig.KeyProviderAttrs{Command: &keyproviderconfig.Command{Path: "/bin/sh", Args: []string{"-c", script}}})
	}
	works(t, command("printf 'wrapped '; exec cat"))
	if out, err := command("sleep 5 & echo answer").UnwrapKey(t.Context(), nil); err != nil || string(out) != "answer\n" {
		t.Errorf("it leaves a child: %q, %v", out, err)
	}
	if _, err := command("head -c 9000 /dev/zero | tr '\\0' x >&2; echo the cause >&2; exit 1").UnwrapKey(t.Context(), nil); err == nil || !strings.HasSuffix(err.Error(), "xxx"+"the cause") || len(err.Error()) > maxSaid+100 {
		t.Errorf("it says much: %.100v", err)
	}
	for script, want := range map[string]string{
		"echo why >&2; exit 3":      "/bin/sh: exit status 3: why",
		"exit 3":                    "/bin/sh: exit status 3",
		"head -c 5000000 /dev/zero": "/bin/sh answers more than 4194304 bytes",
		"kill -9 $$":                "/bin/sh: signal: killed",
	} {
		if out, err := command(script).UnwrapKey(t.Context(), nil); err == nil || err.Error() != want {
			t.Errorf("%s: %d bytes, %v", script, len(out), err)
		}
	}
	if _, err := newClient(t, keyproviderconfig.KeyProviderAttrs{Command: &keyproviderconfig.Command{Path: dir + "/none"}}).UnwrapKey(t.Context(), nil); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), filepath.Join(dir, "none")) {
		t.Errorf("no such program: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := command("sleep 60 & sleep 60").UnwrapKey(ctx, nil); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 30*time.Second {
		t.Errorf("no answer for %s: %v", time.Since(start), err)
	}
}
