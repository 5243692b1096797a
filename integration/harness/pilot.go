package harness

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	ocicryptpb "github.com/containers/ocicrypt/utils/keyprovider"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// PilotClient asks a key provider, and looks at its process.
type PilotClient struct {
	Conn  *grpc.ClientConn
	Admin http.Client
}

// NewPilotClient returns a client of the pilot with sockets keyprovider.sock and
// admin.sock in dir.
func NewPilotClient(t testing.TB, dir string) *PilotClient {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+dir+"/keyprovider.sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	k := &PilotClient{Conn: conn}
	k.Admin.Transport = &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", dir+"/admin.sock")
	}}
	return k
}

// Wrap has a layer key wrapped with the KEK team-a and returns the annotation.
func (k *PilotClient) Wrap(ctx context.Context) ([]byte, error) {
	return k.Call(ctx, ocicryptpb.NewKeyProviderServiceClient(k.Conn).WrapKey,
		Object{"op": "keywrap", "keywrapparams": Object{"ec": Object{"Parameters": Object{"pilot": []string{"dGVhbS1h"}}}, "optsdata": "c2VjcmV0"}},
		func(a KeyProviderOutput) []byte { return a.Wrapped.Annotation })
}

// Unwrap has it unwrapped.
func (k *PilotClient) Unwrap(ctx context.Context, annotation []byte) error {
	b, err := k.Call(ctx, ocicryptpb.NewKeyProviderServiceClient(k.Conn).UnWrapKey,
		Object{"op": "keyunwrap", "keyunwrapparams": Object{"dc": Object{}, "annotation": annotation}},
		func(a KeyProviderOutput) []byte { return a.Unwrapped.OptsData })
	if err == nil && string(b) != "secret" {
		err = fmt.Errorf("unwrapped %q", b)
	}
	return err
}

type KeyProviderOutput struct {
	Wrapped   struct{ Annotation []byte } `json:"keywrapresults"`
	Unwrapped struct{ OptsData []byte }   `json:"keyunwrapresults"`
}

func (k *PilotClient) Call(ctx context.Context, call func(context.Context, *ocicryptpb.KeyProviderKeyWrapProtocolInput, ...grpc.CallOption) (*ocicryptpb.KeyProviderKeyWrapProtocolOutput, error), in Object, result func(KeyProviderOutput) []byte) ([]byte, error) {
	b, err := json.Marshal(in)
	if err != nil {
		return nil, err
	}
	out, err := call(ctx, &ocicryptpb.KeyProviderKeyWrapProtocolInput{KeyProviderKeyWrapProtocolInput: b})
	if err != nil {
		return nil, err
	}
	var a KeyProviderOutput
	err = json.Unmarshal(out.GetKeyProviderKeyWrapProtocolOutput(), &a)
	return result(a), err
}

// Metric returns the value of a metric of pilot without labels.
func (k *PilotClient) Metric(t testing.TB, name string) float64 {
	t.Helper()
	r, err := k.Admin.Get("http://pilot/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut("\n"+string(b), "\n"+name+" ")
	value, _, _ := strings.Cut(rest, "\n")
	f, err := strconv.ParseFloat(value, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return f
}

// ImageKeys is what pilot says a container of an image needs.
type ImageKeys struct {
	Layers []struct {
		DiffID string
		KEKs   []struct {
			ID      string
			Version int
		}
		Other bool
		Why   string
	}
	Refused string
}

// ImageKeys returns what a container of an image in a namespace of containerd's needs.
func (k *PilotClient) ImageKeys(t testing.TB, namespace, image string) (answer ImageKeys) {
	t.Helper()
	var status int
	var b []byte
	Await(t, "pilot's connection to containerd", func() error {
		if status, b = k.imageKeys(t, namespace, image); status == http.StatusServiceUnavailable {
			return fmt.Errorf("%s", b)
		}
		return nil
	})
	if status != http.StatusOK || json.Unmarshal(b, &answer) != nil {
		t.Fatalf("%s: %d %s", image, status, b)
	}
	return answer
}

// ImageKeysError returns the error of an image of which pilot does not say what it needs.
func (k *PilotClient) ImageKeysError(t testing.TB, namespace, image string) string {
	t.Helper()
	status, b := k.imageKeys(t, namespace, image)
	if status == http.StatusOK {
		t.Errorf("%s: pilot says what it needs: %s", image, b)
	}
	return string(b)
}

func (k *PilotClient) imageKeys(t testing.TB, namespace, image string) (int, []byte) {
	t.Helper()
	r, err := k.Admin.Get("http://pilot/image-keys?" + url.Values{"namespace": {namespace}, "image": {image}}.Encode())
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, b
}

// CheckLeaks checks that the process has as many goroutines and open files as before,
// except a few connections that are kept.
func (k *PilotClient) CheckLeaks(t testing.TB, name string, before float64) {
	t.Helper()
	Await(t, name, func() error {
		if now := k.Metric(t, name); now > before+8 {
			return fmt.Errorf("%g, and %g before", now, before)
		}
		return nil
	})
}

// StartPilot starts a key provider in dir and returns the ocicrypt.conf that leads
// to it.
func StartPilot(t testing.TB, dir, broker string, args ...string) (*Process, string) {
	t.Helper()
	socket := filepath.Join(dir, "keyprovider.sock")
	p := Start(t, dir, "pilot", exec.Command("pilot", append([]string{"serve", "--config", "/dev/null", "--listen", "unix://" + socket, "--broker", broker,
		"--diff-listen", "unix://" + dir + "/diff.sock", "--containerd", dir + "/containerd.sock", "--layer-record", dir + "/layers"}, args...)...))
	Await(t, "pilot", Reachable(socket))
	return p, Write(t, filepath.Join(dir, "ocicrypt.conf"), `{"key-providers": {"pilot": {"grpc": "unix://`+socket+`"}}}`)
}

// StartActivatedPilot starts pilot as systemd does, with the sockets of dir passed to it.
// They stay open when it ends, until the test does.
func StartActivatedPilot(t testing.TB, dir, broker string) *Process {
	t.Helper()
	cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ exec pilot serve --config /dev/null --admin-listen off --broker "$1" --containerd "$2" --diff-listen "unix://$3" --layer-record "$4"`,
		"sh", broker, dir+"/containerd.sock", dir+"/diff.sock", dir+"/layers")
	cmd.Env = append(os.Environ(), "LISTEN_FDS=2", "LISTEN_FDNAMES=keyprovider:diff")
	for _, name := range []string{"keyprovider.sock", "diff.sock"} {
		l, ok := sockets.Load(dir + "/" + name)
		if !ok {
			listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: dir + "/" + name, Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			sockets.Store(dir+"/"+name, listener)
			t.Cleanup(func() { listener.Close() })
			l = listener
		}
		f, err := l.(*net.UnixListener).File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	return Start(t, dir, "pilot", cmd)
}

// sockets are those that are passed to pilot: *net.UnixListener by path.
var sockets sync.Map
