package keyprovider

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	ocicryptpb "github.com/containers/ocicrypt/utils/keyprovider"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/ctrlplane/pilot/internal/unixsocket"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// serveGRPC answers the key provider protocol on a unix socket, with KEKs from
// the broker at url, and returns a client.
func serveGRPC(t *testing.T, url string, timeout time.Duration, options ...grpc.DialOption) ocicryptpb.KeyProviderServiceClient {
	t.Helper()
	broker, err := client.New(client.Config{URLs: []string{url}, Timeout: timeout})
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "s")
	l, err := unixsocket.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	service := Service{Provider: New(broker, Config{})}
	service.Register(s)
	go s.Serve(l)
	t.Cleanup(s.Stop)
	conn, err := grpc.NewClient("unix://"+socket, append(options, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return ocicryptpb.NewKeyProviderServiceClient(conn)
}

func message(b []byte) *ocicryptpb.KeyProviderKeyWrapProtocolInput {
	return &ocicryptpb.KeyProviderKeyWrapProtocolInput{KeyProviderKeyWrapProtocolInput: b}
}

// TestCodes asks with a broker that answers well, for what can't be had.
func TestCodes(t *testing.T) {
	fipstest.Refused(t, fipstest.Original)
	b := startBroker(t, map[string][]byte{"a": nil, "short": make([]byte, 16)})
	c := serveGRPC(t, b.url, time.Minute)
	out, err := c.WrapKey(t.Context(), message(wrapRequest(t, "a")))
	if err != nil {
		t.Fatal(err)
	}
	annotation := answerOf(t, out.GetKeyProviderKeyWrapProtocolOutput()).KeyWrapResults.Annotation
	out, err = c.UnWrapKey(t.Context(), message(unwrapRequest(t, annotation)))
	if err != nil {
		t.Fatal(err)
	}
	if got := answerOf(t, out.GetKeyProviderKeyWrapProtocolOutput()).KeyUnwrapResults.OptsData; string(got) != secret {
		t.Errorf("it unwraps to %q", got)
	}

	other := startBroker(t, map[string][]byte{"a": nil, "gone": nil})
	p := newProvider(t, other.url, Config{})
	foreign, gone := wrapFor(t, p, "a"), wrapFor(t, p, "gone")
	original := wrapFor(t, newProvider(t, other.url, Config{Format: FormatOriginal}), "a")
	for _, test := range []struct {
		name  string
		call  string
		input []byte
		code  codes.Code
		want  string
	}{
		{"nothing", "wrap", nil, codes.InvalidArgument, "not the JSON"},
		{"no JSON", "unwrap", []byte("SECRET"), codes.InvalidArgument, "not the JSON"},
		{"wrap as unwrap", "unwrap", wrapRequest(t, "a"), codes.InvalidArgument, `op is "keywrap"`},
		{"unwrap as wrap", "wrap", unwrapRequest(t, annotation), codes.InvalidArgument, `op is "keyunwrap"`},
		{"no KEK named", "wrap", wrapRequest(t, "Enabled"), codes.InvalidArgument, "no KEK is named"},
		{"KEK that can't be", "wrap", wrapRequest(t, "a b"), codes.InvalidArgument, "not allowed"},
		{"KEK of 16 bytes", "wrap", wrapRequest(t, "short"), codes.InvalidArgument, "16 bytes"},
		{"foreign annotation", "unwrap", unwrapRequest(t, []byte(`{"x":1}`)), codes.InvalidArgument, "not pilot's"},
		{"original without a KEK", "unwrap", unwrapRequest(t, original), codes.InvalidArgument, "does not say which KEK"},
		{"unknown KEK", "wrap", wrapRequest(t, "nobody"), codes.NotFound, `KEK "nobody"`},
		{"unknown KEK to unwrap with", "unwrap", unwrapRequest(t, gone), codes.NotFound, `KEK "gone"`},
		{"another KEK of that name", "unwrap", unwrapRequest(t, foreign), codes.FailedPrecondition, `KEK "a" version 1 does not unwrap`},
		{"another KEK of that name, original", "unwrap", unwrapRequest(t, original, "a"), codes.FailedPrecondition, `KEK "a" version 1 does not unwrap`},
		{"KEK that the caller does not name", "unwrap", unwrapRequest(t, annotation, "b"), codes.FailedPrecondition, `the key given is "b"`},
	} {
		call := c.WrapKey
		if test.call == "unwrap" {
			call = c.UnWrapKey
		}
		_, err := call(t.Context(), message(test.input))
		if status.Code(err) != test.code || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%s: %v, want %s: %q", test.name, err, test.code, test.want)
		}
	}
}

// TestServiceNames passes parameters by several names.
func TestServiceNames(t *testing.T) {
	metrics := NewMetrics(nil)
	b := startBroker(t, map[string][]byte{"a": nil, "b": nil})
	service := Service{Provider: newProvider(t, b.url, Config{Name: "pilot", Metrics: metrics}), Names: []string{"pilot", "second"}, Metrics: metrics}
	wrap := func(params string) (string, error) {
		var out strings.Builder
		err := service.Exec(t.Context(), strings.NewReader(`{"op":"keywrap","keywrapparams":{"ec":{"Parameters":`+params+`},"optsdata":"c2VjcmV0"}}`), &out)
		return out.String(), err
	}
	out, err := wrap(`{"second":["Yg=="],"pilot":["YQ=="],"other":["Yw=="]}`)
	if err != nil {
		t.Fatal(err)
	}
	list, err := wireformat.ParseAnnotation(answerOf(t, []byte(out)).KeyWrapResults.Annotation)
	if err != nil || len(list) != 2 || list[0].KEKID != "a" || list[1].KEKID != "b" {
		t.Errorf("%+v, %v", list, err)
	}
	for params, want := range map[string]string{
		`{}`:                              "bad request: no KEK is named: use the recipient provider:pilot:KEK",
		`{"pubkeys":["YQ=="]}`:            "bad request: no KEK is named: use the recipient provider:pilot:KEK",
		`{"third":["YQ=="],"pilot":null}`: `bad request: no KEK is named: use the recipient provider:pilot:KEK, or add "third" to provider-name if pilot has that name in ocicrypt.conf`,
	} {
		if _, err := wrap(params); err == nil || err.Error() != want || !errors.Is(err, ErrInput) {
			t.Errorf("%s: %v, want %s", params, err, want)
		}
	}
	// One that is malformed counts once, too.
	refused := metrics.requests.WithLabelValues("wrap", codes.InvalidArgument.String())
	before := testutil.ToFloat64(refused)
	if _, err := wrap(`"SECRET"`); err == nil || testutil.ToFloat64(refused) != before+1 {
		t.Errorf("%v, counted %v times", err, testutil.ToFloat64(refused)-before)
	}
	if _, err := wrap(`{}`); err == nil || testutil.ToFloat64(refused) != before+2 {
		t.Errorf("%v, counted %v times", err, testutil.ToFloat64(refused)-before)
	}
}

// TestCodesOfBadBroker asks with brokers that do not give a KEK. An answer
// comes, at the latest after the broker's timeout, which is short for those that
// hang.
func TestCodesOfBadBroker(t *testing.T) {
	const timeout, short = 20 * time.Second, 500 * time.Millisecond
	hang := func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	for _, test := range []struct {
		name  string
		serve http.HandlerFunc
		code  codes.Code
		want  string
	}{
		{"refuses", func(w http.ResponseWriter, _ *http.Request) { problem(w, 403, "about:blank", "not you") }, codes.PermissionDenied, "403"},
		{"wants a login", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(401) }, codes.Unavailable, "401"},
		{"knows no KEK", func(w http.ResponseWriter, _ *http.Request) { problem(w, 404, "about:blank", "no such KEK") }, codes.NotFound, "404"},
		{"is a firewall", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(403) }, codes.Unavailable, "not from copilot"},
		{"is another service", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(404) }, codes.Unavailable, "not from copilot"},
		{"fails", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }, codes.Unavailable, "500"},
		{"is overloaded", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) }, codes.Unavailable, "broker gives no usable answer"},
		{"talks nonsense", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>SECRET") }, codes.Unavailable, "text/html"},
		{"has no key in it", func(w http.ResponseWriter, _ *http.Request) { reply(w, map[string]any{"id": "a", "version": 1}) }, codes.Unavailable, "not an AES key"},
		{"hangs", hang, codes.Unavailable, "broker gives no usable answer"},
		{"hangs halfway", func(w http.ResponseWriter, r *http.Request) {
			w.Write([]byte("{"))
			w.(http.Flusher).Flush()
			hang(w, r)
		}, codes.Unavailable, "broker gives no usable answer"},
		{"hangs up", func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }, codes.Unavailable, "broker gives no usable answer"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := httptest.NewServer(test.serve)
			t.Cleanup(s.Close)
			within := timeout
			if strings.HasPrefix(test.name, "hangs") && test.name != "hangs up" {
				within = short
			}
			refused(t, s.URL, within, test.code, test.want)
		})
	}
	t.Run("is not there", func(t *testing.T) {
		t.Parallel()
		refused(t, "unix://"+filepath.Join(t.TempDir(), "s"), timeout, codes.Unavailable, "broker gives no usable answer")
	})
	t.Run("does not even accept", func(t *testing.T) {
		t.Parallel()
		socket := filepath.Join(t.TempDir(), "s")
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		refused(t, "unix://"+socket, short, codes.Unavailable, "broker gives no usable answer")
	})
}

// refused wraps and unwraps with the broker at url, and expects no answer.
func refused(t *testing.T, url string, timeout time.Duration, code codes.Code, want string) {
	t.Helper()
	a, err := wrap(client.KEK{ID: "a", Version: 1, Key: bytes.Repeat([]byte{1}, 32)}, FormatA256GCMKW, []byte(secret))
	if err != nil {
		t.Fatal(err)
	}
	annotation, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	c := serveGRPC(t, url, timeout)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	for name, call := range map[string]func() error{
		"wrap":   func() error { _, err := c.WrapKey(ctx, message(wrapRequest(t, "a"))); return err },
		"unwrap": func() error { _, err := c.UnWrapKey(ctx, message(unwrapRequest(t, annotation))); return err },
	} {
		start := time.Now()
		err := call()
		if took := time.Since(start); took > timeout+20*time.Second {
			t.Errorf("%s: it took %s, and the broker's timeout is %s", name, took, timeout)
		}
		if status.Code(err) != code || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), `KEK "a": copilot at `) || strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%s: %v, want %s: %q", name, err, code, want)
		}
	}
}
