package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"

	"github.com/ctrlplane/pilot/internal/status"
	"github.com/ctrlplane/pilot/internal/unixsocket"
	"github.com/ctrlplane/pilot/internal/version"
)

// newRegistry returns a registry with the metrics of the process.
func newRegistry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "pilot_build_info", Help: "1, with pilot's version.", ConstLabels: prometheus.Labels{"version": version.Version},
	})
	info.Set(1)
	r.MustRegister(info, status.FIPS("pilot_fips140_info"), collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// newStatus returns a handler for metrics, health and readiness.
func newStatus(r *prometheus.Registry, ready func(context.Context) error) *http.ServeMux {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(r, promhttp.HandlerOpts{}))
	status.Health(mux, ready)
	return mux
}

// serveStatus adds to g servers on admin-listen and metrics-listen until ctx is done.
func (c *configuration) serveStatus(ctx context.Context, g *errgroup.Group, r *prometheus.Registry, known layers, ready func(context.Context) error) error {
	path := c.AdminListen.path()
	if c.AdminListen == "" && c.Listen == defaultListen {
		path = defaultAdminSocket
	}
	if path != "" {
		l, err := unixsocket.Listen(path)
		if err != nil {
			return fmt.Errorf("admin-listen: %w", err)
		}
		mux := newStatus(r, ready)
		status.Profiles(mux)
		known.handle(mux)
		serveHTTP(ctx, g, l, mux)
	}
	if c.MetricsListen != "" {
		l, err := net.Listen("tcp", c.MetricsListen)
		if err != nil {
			return fmt.Errorf("metrics-listen: %w", err)
		}
		serveHTTP(ctx, g, l, newStatus(r, ready))
	}
	return nil
}

func serveHTTP(ctx context.Context, g *errgroup.Group, l net.Listener, h http.Handler) {
	s := &http.Server{Handler: h, ReadTimeout: 10 * time.Second, WriteTimeout: time.Minute, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
	g.Go(func() error {
		if err := s.Serve(l); err != http.ErrServerClosed {
			return err
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		return s.Close()
	})
}
