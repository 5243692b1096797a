package mirror

import (
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"google.golang.org/grpc/codes"
)

// metrics are what Prometheus reads.
type metrics struct {
	requests *prometheus.CounterVec
	blobs    *prometheus.CounterVec
	bytes    *prometheus.CounterVec
	sending  prometheus.Gauge
}

// newMetrics registers metrics with r, which may be nil.
func newMetrics(r prometheus.Registerer) *metrics {
	with := promauto.With(r)
	m := &metrics{
		requests: with.NewCounterVec(prometheus.CounterOpts{
			Name: "pilot_mirror_requests_total", Help: "Requests to the mirror, by what they were about and the status of the answer.",
		}, []string{"kind", "code"}),
		blobs: with.NewCounterVec(prometheus.CounterOpts{
			Name: "pilot_mirror_blobs_total", Help: "Blobs that the mirror was to send, by result: a status code of gRPC. DataLoss is a layer that was changed, FailedPrecondition one without a usable key.",
		}, []string{"encrypted", "result"}),
		bytes: with.NewCounterVec(prometheus.CounterOpts{
			Name: "pilot_mirror_bytes_total", Help: "Bytes of the blobs that the mirror has sent to their end.",
		}, []string{"encrypted"}),
		sending: with.NewGauge(prometheus.GaugeOpts{
			Name: "pilot_mirror_blobs_in_progress", Help: "Blobs that the mirror sends now, or that wait for it.",
		}),
	}
	// An alert has to see the first one, and a counter that begins with it does
	// not rise.
	for _, result := range []codes.Code{codes.OK, codes.DataLoss, codes.FailedPrecondition} {
		m.blobs.WithLabelValues("true", result.String())
	}
	return m
}

// begin counts a blob that is to be sent. The caller must call end with its size in bytes
// and the error.
func (m *metrics) begin(isEncrypted bool) (end func(judge func(error) verdict, size int64, err error)) {
	encrypted := strconv.FormatBool(isEncrypted)
	m.sending.Inc()
	return func(judge func(error) verdict, size int64, err error) {
		m.sending.Dec()
		result := codes.OK
		if err != nil {
			result = judge(err).result
		} else {
			m.bytes.WithLabelValues(encrypted).Add(float64(size))
		}
		m.blobs.WithLabelValues(encrypted, result.String()).Inc()
	}
}
