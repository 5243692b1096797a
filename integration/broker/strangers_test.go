package broker

import (
	"fmt"
	"net"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// strangers are answers of other servers in a broker's place: status, header fields, body.
var strangers = map[string][3]string{
	"ingress without a backend":   {"404 Not Found", "Content-Type: text/plain; charset=utf-8", "default backend - 404"},
	"ingress's page":              {"404 Not Found", "Content-Type: text/html\r\nServer: nginx/1.27.1", "<html><center>nginx</center></html>"},
	"bare 404":                    {"404 Not Found", "X-A: b", ""},
	"firewall":                    {"403 Forbidden", "Content-Type: text/html\r\nServer: cloudflare", "<html>Sorry, you have been blocked</html>"},
	"firewall for APIs":           {"403 Forbidden", "Content-Type: application/json", `{"message":"Forbidden"}`},
	"TLS port":                    {"400 Bad Request", "Content-Type: text/html", "<html>The plain HTTP request was sent to HTTPS port</html>"},
	"proxy that wants a login":    {"407 Proxy Authentication Required", `Proxy-Authenticate: Basic realm="proxy"`, ""},
	"ingress that wants a login":  {"401 Unauthorized", `WWW-Authenticate: Basic realm="staff only"`, "<html>401</html>"},
	"object store":                {"409 Conflict", "Content-Type: application/xml", "<Error><Code>OperationAborted</Code></Error>"},
	"ingress with a small limit":  {"413 Request Entity Too Large", "Content-Type: text/html", "<html>413</html>"},
	"retired service":             {"410 Gone", "Content-Type: text/plain", "gone"},
	"Spring":                      {"404 Not Found", "Content-Type: application/problem+json", `{"type":"about:blank","title":"Not Found","status":404,"detail":"No static resource","instance":"/api/v2/keks/team-a/key"}`},
	"validator":                   {"422 Unprocessable Entity", "Content-Type: application/problem+json", `{"title":"Unprocessable Entity","status":422,"errors":[]}`},
	"captive portal":              {"302 Found", "Location: https://login.example.com/", ""},
	"captive portal's page":       {"200 OK", "Content-Type: text/html", "<html>Welcome to our guest network</html>"},
	"captive portal by RFC 6585":  {"511 Network Authentication Required", "Content-Type: text/html", "<html>log in</html>"},
	"another service":             {"200 OK", "Content-Type: application/json", `{"status":"UP"}`},
	"another service without one": {"200 OK", "Content-Type: application/json", `{"id":"team-a","version":1,"key":null}`},
	"JSON that is cut":            {"200 OK", "Content-Type: application/json", `{"id":"team-a","version":1,"key":"AAAAAAAA`},
	"a key as text":               {"200 OK", "Content-Type: text/plain", `{"id":"team-a","version":1,"key":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`},
}

// TestAnotherServerIsNoBroker has another server answer in copilot's place. A node keeps using its KEK,
// as during an outage, and tries the next broker if there is one. Only copilot itself can
// revoke the KEK.
func TestAnotherServerIsNoBroker(t *testing.T) {
	harness.Long(t)
	t.Parallel()
	dir := harness.TempDir(t)
	proxy := harness.StartBrokerBehindProxy(t, dir, "team-a")
	var answered atomic.Int32
	become := func(answer [3]string) {
		proxy.SetFault(func(c *net.TCPConn, _ *harness.FaultyProxy) {
			c.Read(make([]byte, 64<<10))
			answered.Add(1)
			fmt.Fprintf(c, "HTTP/1.1 %s\r\n%s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", answer[0], answer[1], len(answer[2]), answer[2])
		})
	}

	const ttl = time.Second
	harness.StartPilot(t, dir+"/one", proxy.URL, "--broker-timeout", "1s", "--kek-cache-ttl", ttl.String(), "--kek-cache-grace", "1h", "--diff-listen", "off")
	one := harness.NewPilotClient(t, dir+"/one")
	harness.StartPilot(t, dir+"/two", proxy.URL+",unix://"+dir+"/copilot.sock", "--kek-cache-size", "0", "--diff-listen", "off")
	two := harness.NewPilotClient(t, dir+"/two")

	var annotation []byte
	know := func(t *testing.T) {
		t.Helper()
		proxy.SetFault(harness.NoFault)
		harness.Await(t, "a broker", func() (err error) {
			if annotation, err = one.Wrap(t.Context()); err != nil {
				return err
			}
			return one.Unwrap(t.Context(), annotation)
		})
	}
	for name, answer := range strangers {
		t.Run(name, func(t *testing.T) {
			know(t)
			become(answer)
			time.Sleep(ttl)
			before := answered.Load()
			if err := one.Unwrap(t.Context(), annotation); err != nil {
				t.Errorf("with a KEK in memory: %v", err)
			}
			if answered.Load() == before {
				t.Error("the stranger was not asked")
			}
			_, err := one.Wrap(t.Context())
			if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "copilot at "+proxy.URL) || strings.Contains(err.Error(), "AAAAAAAA") {
				t.Errorf("wrap: %v", err)
			}
			harness.Await(t, "another broker", func() error {
				annotation, err := two.Wrap(t.Context())
				if err != nil {
					return err
				}
				return two.Unwrap(t.Context(), annotation)
			})
		})
	}

	know(t)
	harness.Output(t, harness.Command(t, "copilot", "keys", "disable", "--dir", proxy.Dir, "team-a"))
	harness.Await(t, "the KEK is disabled", func() error {
		if err := one.Unwrap(t.Context(), annotation); status.Code(err) != codes.PermissionDenied {
			return fmt.Errorf("unwrap: %w", err)
		}
		return nil
	})
	become(strangers["firewall"])
	harness.Await(t, "a stranger does not bring it back", func() error {
		if err := one.Unwrap(t.Context(), annotation); status.Code(err) != codes.Unavailable {
			return fmt.Errorf("unwrap: %w", err)
		}
		return nil
	})
}

// TestWrongPathSaysNothingOfTheKEK has a proxy change the path in front of copilot, whose 404 then says
// nothing about the KEK.
func TestWrongPathSaysNothingOfTheKEK(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	address := loopbacktest.FreeAddress(t)
	harness.Output(t, harness.Command(t, "copilot", "keys", "create", "--dir", dir, "team-a"))
	harness.Start(t, dir, "copilot", exec.Command("copilot", "serve", "--dir", dir, "--insecure-loopback", "--listen", address))
	harness.Await(t, "copilot", harness.Reachable(dir+"/admin.sock"))
	harness.StartPilot(t, dir+"/node", "http://"+address+"/keys", "--diff-listen", "off")
	_, err := harness.NewPilotClient(t, dir+"/node").Wrap(t.Context())
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "path in the broker's URL is wrong") {
		t.Errorf("got %v", err)
	}
}

// TestForeignAnnotationInOutageDisturbsNoOther has, while no broker answers, somebody's annotation in the
// original's format come that no version of the KEK unwraps. Those of others are
// unwrapped as before.
func TestForeignAnnotationInOutageDisturbsNoOther(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.Original)
	dir := harness.TempDir(t)
	process, url := harness.StartBroker(t, dir, "team-a")
	harness.StartPilot(t, dir+"/node", url, "--broker-timeout", "1s", "--annotation-format", "original", "--default-keks", "team-a", "--diff-listen", "off")
	node := harness.NewPilotClient(t, dir+"/node")
	var annotation []byte
	harness.Await(t, "the broker", func() (err error) {
		if annotation, err = node.Wrap(t.Context()); err != nil {
			return err
		}
		return node.Unwrap(t.Context(), annotation)
	})
	process.Stop(t)
	time.Sleep(3 * time.Second) // or it was asked which version is current a moment ago
	foreign := []byte(`{"iv":"AAAAAAAAAAAAAAAAAAAAAA==","method":"AES-GCM","wrappedKey":"` + strings.Repeat("AAAA", 20) + `"}`)
	for range 3 {
		if err := node.Unwrap(t.Context(), foreign); err == nil || !strings.Contains(err.Error(), "does not unwrap this layer key") {
			t.Errorf("the foreign one: %v", err)
		}
		if err := node.Unwrap(t.Context(), annotation); err != nil {
			t.Errorf("another: %v", err)
		}
	}
}
