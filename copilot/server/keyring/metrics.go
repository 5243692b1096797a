package keyring

import (
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ctrlplane/pilot/copilot/kms"
)

// Metrics are what Prometheus reads of a keyring.
type Metrics struct {
	registry  prometheus.Registerer
	seconds   *prometheus.HistogramVec
	errors    *prometheus.CounterVec
	wrapCount *prometheus.GaugeVec
	wrapLimit prometheus.Gauge
}

// NewMetrics registers the metrics of a keyring.
func NewMetrics(registry prometheus.Registerer) *Metrics {
	m := &Metrics{
		registry: registry,
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "copilot_kms_seconds", Help: "Duration of calls of a KMS.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		}, []string{"backend", "operation"}),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "copilot_kms_errors_total", Help: "Calls of a KMS that failed.",
		}, []string{"backend", "operation"}),
		wrapCount: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "copilot_kek_wraps", Help: "Upper bound of the keys wrapped with a version of a KEK, by all replicas, when this one last wrapped.",
		}, []string{"kek", "version"}),
		wrapLimit: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "copilot_kek_wrap_limit", Help: "Keys that a version of a KEK may wrap: wrap-limit.",
		}),
	}
	registry.MustRegister(m.seconds, m.errors, m.wrapCount, m.wrapLimit)
	return m
}

func (m *Metrics) call(backend, operation string, took time.Duration, err error) {
	m.seconds.WithLabelValues(backend, operation).Observe(took.Seconds())
	if err != nil {
		m.errors.WithLabelValues(backend, operation).Inc()
	}
}

func (m *Metrics) wraps(id string, version int, n int64) {
	m.wrapCount.WithLabelValues(id, strconv.Itoa(version)).Set(float64(n))
}

// backend registers what a backend counts itself.
func (m *Metrics) backend(name string, b kms.Backend) {
	if r, ok := b.(interface{ Restarts() uint64 }); ok {
		m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "copilot_kms_module_restarts_total", Help: "Restarts of the process that a PKCS#11 module runs in.",
			ConstLabels: prometheus.Labels{"backend": name},
		}, func() float64 { return float64(r.Restarts()) }))
	}
}
