package workloads

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// The results of asking whether a container may be created.
const (
	resultPlain       = "not-encrypted"
	resultAllowed     = "allowed"
	resultDenied      = "denied"
	resultUnavailable = "unavailable"
)

type metrics struct {
	verdicts *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
}

// buckets range from an image that is known to be plain to what containerd waits for.
var buckets = []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5}

func newMetrics(r prometheus.Registerer) *metrics {
	with := promauto.With(r)
	m := &metrics{
		verdicts: with.NewCounterVec(prometheus.CounterOpts{
			Name: "pilot_workload_verdicts_total", Help: "Containers about to be created, by verdict: of plain images (not-encrypted), of encrypted images that the workload may use (allowed) or not (denied), and those that could not be decided (unavailable).",
		}, []string{"result"}),
		seconds: with.NewHistogramVec(prometheus.HistogramOpts{
			Name: "pilot_workload_verdict_seconds", Help: "How long a verdict took, with the request to the broker if there was one.", Buckets: buckets,
		}, []string{"result"}),
	}
	// An alert must see the first denial.
	for _, result := range []string{resultPlain, resultAllowed, resultDenied, resultUnavailable} {
		m.verdicts.WithLabelValues(result)
	}
	return m
}

func (m *metrics) observe(result string, took time.Duration) {
	m.verdicts.WithLabelValues(result).Inc()
	m.seconds.WithLabelValues(result).Observe(took.Seconds())
}
