package minigrpc

import (
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"

	keyproviderconfig "github.com/containers/ocicrypt/config/keyprovider-config"

	"github.com/ctrlplane/pilot/processor/ocicryptclient"
	"github.com/ctrlplane/pilot/processor/ocicryptclient/transporttest"
)

func TestCall(t *testing.T) { transporttest.Run(t, Call) }

func TestErrorSaysWhatServerDoesWrong(t *testing.T) {
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
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		server := &http.Server{Handler: test.handler, Protocols: new(http.Protocols)}
		server.Protocols.SetUnencryptedHTTP2(true)
		go server.Serve(l)
		t.Cleanup(func() { server.Close() })
		c, err := ocicryptclient.New("p", keyproviderconfig.KeyProviderAttrs{Grpc: l.Addr().String()}, Call)
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.Forward(t.Context(), ocicryptclient.Unwrap, nil)
		if err == nil || !strings.Contains(err.Error(), "key provider at "+l.Addr().String()+": ") || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
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
