package mirror

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"google.golang.org/grpc/codes"
)

// lazyMetrics are what Prometheus reads of layers that are pulled lazily.
type lazyMetrics struct {
	ranges    *prometheus.CounterVec
	bytes     *prometheus.CounterVec
	fetched   prometheus.Counter
	fullPulls *prometheus.CounterVec
	proofs    *prometheus.CounterVec
	latency   prometheus.Histogram
	layers    prometheus.Gauge
	tails     prometheus.Gauge
}

// newLazyMetrics registers metrics with r, which may be nil.
func newLazyMetrics(r prometheus.Registerer) *lazyMetrics {
	with := promauto.With(r)
	m := &lazyMetrics{
		ranges: with.NewCounterVec(prometheus.CounterOpts{
			Name: "pilot_lazy_ranges_total", Help: "Requests of the snapshotter for ranges and sizes of layers, by result: a status code of gRPC. FailedPrecondition is a layer that is not lazy, or without a usable key.",
		}, []string{"result"}),
		bytes: with.NewCounterVec(prometheus.CounterOpts{
			Name: "pilot_lazy_bytes_total", Help: "Bytes of layers that were sent to the snapshotter, by where they came from: the registry, or memory.",
		}, []string{"from"}),
		fetched: with.NewCounter(prometheus.CounterOpts{
			Name: "pilot_lazy_verified_bytes_total", Help: "Bytes of the layers' first and last parts, which were fetched from the registry and verified before anything else of the layer is served.",
		}),
		fullPulls: with.NewCounterVec(prometheus.CounterOpts{
			Name: "pilot_lazy_full_pulls_total", Help: "Layers that the snapshotter asked for and that have to be pulled as a whole, by reason. A layer counts once in ten minutes.",
		}, []string{"reason"}),
		proofs: with.NewCounterVec(prometheus.CounterOpts{
			Name: "pilot_lazy_layers_read_whole_total", Help: "Lazy layers that were read as a whole, since another image has the same diff ID, by result. FailedPrecondition is a layer that was made to be taken for another.",
		}, []string{"result"}),
		latency: with.NewHistogram(prometheus.HistogramOpts{
			Name: "pilot_lazy_range_duration_seconds", Help: "How long ranges took, until the snapshotter had the last byte.",
			Buckets: []float64{.001, .005, .025, .1, .5, 2.5, 10},
		}),
		layers: with.NewGauge(prometheus.GaugeOpts{
			Name: "pilot_lazy_layers", Help: "Layers that are served lazily and that pilot remembers.",
		}),
		tails: with.NewGauge(prometheus.GaugeOpts{
			Name: "pilot_lazy_toc_bytes", Help: "Bytes of tables of contents in memory.",
		}),
	}
	// An alert has to see the first one.
	for _, reason := range lazyReasons {
		m.fullPulls.WithLabelValues(reason)
	}
	for _, result := range []codes.Code{codes.OK, codes.DataLoss, codes.FailedPrecondition, codes.Unavailable} {
		m.ranges.WithLabelValues(result.String())
	}
	return m
}

// ended counts a request.
func (m *lazyMetrics) ended(v verdict, began time.Time) {
	m.ranges.WithLabelValues(v.result.String()).Inc()
	if v.result == codes.OK {
		m.latency.Observe(time.Since(began).Seconds())
	}
}
