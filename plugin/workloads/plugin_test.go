package workloads

import (
	"context"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
)

// runtime is a containerd with a time limit of ten seconds.
type runtime struct{ stub.Stub }

func (runtime) RequestTimeout() time.Duration { return 10 * time.Second }
func (runtime) RuntimeNRIVersion() string     { return "v0.10.0" }

func TestPluginReadsSettingsAgainUntilItCan(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "pilot.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	allows := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})}
	go allows.Serve(l)
	t.Cleanup(func() { allows.Close() })

	broken, opened := errors.New("pilot.toml:3: nonsense: unknown setting"), 0
	p := Plugin{stub: runtime{}, Open: func(config string) (string, *Offline, error) {
		if opened++; config != "passed" {
			t.Errorf("containerd has passed %q", config)
		}
		return socket, &Offline{}, broken
	}}
	if _, err := p.Configure(t.Context(), "passed", "containerd", "2.2.9"); err != nil {
		t.Fatal(err)
	}
	// Each version of containerd asks in one of these ways.
	asks := map[string]func(context.Context) error{
		"create": func(ctx context.Context) error {
			_, _, err := p.CreateContainer(ctx, &api.PodSandbox{}, &api.Container{})
			return err
		},
		"validate": func(ctx context.Context) error {
			return p.ValidateContainerAdjustment(ctx, &api.ValidateContainerAdjustmentRequest{})
		},
	}
	for name, ask := range asks {
		if err := ask(t.Context()); !errors.Is(err, broken) || !strings.Contains(err.Error(), "no container is created until") {
			t.Errorf("%s, without settings: %v", name, err)
		}
	}
	broken, opened = nil, 0
	for name, ask := range asks {
		if err := ask(t.Context()); err != nil {
			t.Errorf("%s, once the settings were corrected: %v", name, err)
		}
	}
	if opened != 1 {
		t.Errorf("settings that could be read were read %d times", opened)
	}
}
