package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// TestAdminSocketServesMetricsHealthAndProfiles asks a pilot that has wrapped keys.
func TestAdminSocketServesMetricsHealthAndProfiles(t *testing.T) {
	t.Parallel()
	url, _ := startBroker(t)
	dir := t.TempDir()
	metrics := loopbacktest.FreeAddress(t)
	startServe(t, "unix://"+dir+"/s", "--broker", url, "--admin-listen", "unix://"+dir+"/admin.sock", "--metrics-listen", metrics)
	for range 3 {
		if err := ask(t, "unix://"+dir+"/s", insecure.NewCredentials()); err != nil {
			t.Fatal(err)
		}
	}
	admin := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, "admin.sock"))
	}}}
	get := func(c *http.Client, url string) (int, string) {
		r, err := c.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		return r.StatusCode, string(b)
	}
	for _, where := range []struct {
		client *http.Client
		url    string
	}{{&admin, "http://pilot"}, {http.DefaultClient, "http://" + metrics}} {
		_, text := get(where.client, where.url+"/metrics")
		for _, want := range []string{
			`pilot_key_requests_total{operation="wrap",result="OK"} 3`,
			`pilot_broker_requests_total{operation="kek",result="OK"} 3`,
			`pilot_kek_lookups_total{outcome="miss"} 3`,
			"pilot_keks_cached 1",
			`pilot_key_request_seconds_count{operation="wrap"} 3`,
			"pilot_build_info{",
			"process_open_fds ",
		} {
			if !strings.Contains(text, want) {
				t.Errorf("%s lacks %s:\n%s", where.url, want, text)
			}
		}
		for _, path := range []string{"/healthz", "/readyz"} {
			if status, text := get(where.client, where.url+path); status != http.StatusNoContent {
				t.Errorf("%s%s: %d %s", where.url, path, status, text)
			}
		}
	}
	if status, text := get(&admin, "http://pilot/debug/pprof/goroutine?debug=1"); status != http.StatusOK || !strings.Contains(text, "goroutine profile") {
		t.Errorf("profiles: %d %s", status, text)
	}
	if status, _ := get(http.DefaultClient, "http://"+metrics+"/debug/pprof/"); status != http.StatusNotFound {
		t.Errorf("the address for metrics serves profiles: %d", status)
	}

	conn, err := grpc.NewClient("unix://"+dir+"/s", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if h, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil || h.Status != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("health: %v, %v", h, err)
	}
}
