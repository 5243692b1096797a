package server

import (
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/ctrlplane/pilot/copilot/server/auditing"
	"github.com/ctrlplane/pilot/copilot/server/keyring"
	"github.com/ctrlplane/pilot/internal/status"
)

// metrics are what Prometheus reads. No label is an identity, since there may be many.
type metrics struct {
	registry      *prometheus.Registry
	keyring       *keyring.Metrics
	requests      *prometheus.CounterVec
	seconds       *prometheus.HistogramVec
	auditFailures prometheus.Counter
	shed          prometheus.Counter
	refused       prometheus.Counter
	policyUsable  prometheus.Gauge
	rolledBack    prometheus.Gauge
	policyLoaded  prometheus.Gauge
}

func newMetrics() *metrics {
	buckets := []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}
	m := &metrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "copilot_requests_total", Help: "Requests, by action, the audit log's verdict and the HTTP status.",
		}, []string{"action", "verdict", "status"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "copilot_request_seconds", Help: "Duration of requests, with their audit.", Buckets: buckets,
		}, []string{"action"}),
		auditFailures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "copilot_audit_failures_total", Help: "Requests refused because they could not be audited.",
		}),
		shed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "copilot_connections_shed_total", Help: "Connections closed because they waited too long for their TLS handshake.",
		}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "copilot_connections_refused_total", Help: "Connections refused because an identity, or an address, had too many open.",
		}),
		rolledBack: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "copilot_store_rolled_back", Help: "Records of the store that were found put back as they were earlier, or deleted, at the last check: they are refused until acknowledged.",
		}),
		policyUsable: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "copilot_policy_usable", Help: "1 if the policy file was valid when last read, else 0: the previous policy stays in force.",
		}),
		policyLoaded: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "copilot_policy_loaded_timestamp_seconds", Help: "When the policy in force was read.",
		}),
	}
	m.registry.MustRegister(m.requests, m.seconds, m.auditFailures, m.shed, m.refused, m.policyUsable, m.policyLoaded, m.rolledBack, status.FIPS("copilot_fips140_info"),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), collectors.NewBuildInfoCollector())
	m.keyring = keyring.NewMetrics(m.registry)
	return m
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}

func (m *metrics) request(e *auditing.Entry, took time.Duration) {
	m.requests.WithLabelValues(e.Action, e.Verdict, strconv.Itoa(e.Status)).Inc()
	m.seconds.WithLabelValues(e.Action).Observe(took.Seconds())
}

// auditLosses registers how often lines of the audit log were found missing.
func (m *metrics) auditLosses(losses func() int) {
	m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "copilot_audit_losses_total", Help: "How often lines of the audit log were found missing since the start: truncated, deleted or replaced.",
	}, func() float64 { return float64(losses()) }))
}
