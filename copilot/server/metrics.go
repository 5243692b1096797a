package server

import (
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/ctrlplane/pilot/copilot/kms"
)

// metrics are what Prometheus reads. No label holds an identity, of which there
// may be many.
type metrics struct {
	registry      *prometheus.Registry
	requests      *prometheus.CounterVec
	seconds       *prometheus.HistogramVec
	kmsSeconds    *prometheus.HistogramVec
	kmsErrors     *prometheus.CounterVec
	wrapCount     *prometheus.GaugeVec
	wrapLimit     prometheus.Gauge
	auditFailures prometheus.Counter
	shed          prometheus.Counter
	refused       prometheus.Counter
	policyUsable  prometheus.Gauge
	policyLoaded  prometheus.Gauge
}

func newMetrics() *metrics {
	buckets := []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}
	m := &metrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "copilot_requests_total", Help: "Requests, by what was wanted, the audit log's verdict and the HTTP status.",
		}, []string{"action", "verdict", "status"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "copilot_request_seconds", Help: "How long requests took, with their audit.", Buckets: buckets,
		}, []string{"action"}),
		kmsSeconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "copilot_kms_seconds", Help: "How long calls of a KMS took.", Buckets: buckets,
		}, []string{"backend", "operation"}),
		kmsErrors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "copilot_kms_errors_total", Help: "Calls of a KMS that failed.",
		}, []string{"backend", "operation"}),
		wrapCount: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "copilot_kek_wraps", Help: "Keys wrapped with a version of a KEK, at most, by all replicas, when this one wrapped last.",
		}, []string{"kek", "version"}),
		wrapLimit: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "copilot_kek_wrap_limit", Help: "Keys that a version of a KEK may wrap: wrap-limit.",
		}),
		auditFailures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "copilot_audit_failures_total", Help: "Requests refused because they could not be audited.",
		}),
		shed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "copilot_connections_shed_total", Help: "Connections turned away since they waited too long for their TLS handshake.",
		}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "copilot_connections_refused_total", Help: "Connections refused since an identity, or an address, had too many open.",
		}),
		policyUsable: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "copilot_policy_usable", Help: "1 if the policy file could be used when it was read last, else 0: the one before counts.",
		}),
		policyLoaded: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "copilot_policy_loaded_timestamp_seconds", Help: "When the policy that counts was read.",
		}),
	}
	m.registry.MustRegister(m.requests, m.seconds, m.kmsSeconds, m.kmsErrors, m.wrapCount, m.wrapLimit, m.auditFailures, m.shed, m.refused, m.policyUsable, m.policyLoaded,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), collectors.NewBuildInfoCollector())
	return m
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}

func (m *metrics) request(e *entry, took time.Duration) {
	m.requests.WithLabelValues(e.Action, e.Verdict, strconv.Itoa(e.Status)).Inc()
	m.seconds.WithLabelValues(e.Action).Observe(took.Seconds())
}

func (m *metrics) kms(backend, operation string, took time.Duration, err error) {
	m.kmsSeconds.WithLabelValues(backend, operation).Observe(took.Seconds())
	if err != nil {
		m.kmsErrors.WithLabelValues(backend, operation).Inc()
	}
}

// auditLosses adds how often lines of the audit log were found missing.
func (m *metrics) auditLosses(losses func() int) {
	m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "copilot_audit_losses_total", Help: "How often lines of the audit log were found missing since the start: cut off, deleted or replaced.",
	}, func() float64 { return float64(losses()) }))
}

// backend adds what a backend counts itself.
func (m *metrics) backend(name string, b kms.Backend) {
	if r, ok := b.(interface{ Restarts() uint64 }); ok {
		m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "copilot_kms_module_restarts_total", Help: "Restarts of the process that a PKCS#11 module runs in.",
			ConstLabels: prometheus.Labels{"backend": name},
		}, func() float64 { return float64(r.Restarts()) }))
	}
}

func (m *metrics) wraps(id string, version int, n int64) {
	m.wrapCount.WithLabelValues(id, strconv.Itoa(version)).Set(float64(n))
}
