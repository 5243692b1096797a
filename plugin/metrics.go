package plugin

import (
	"context"
	"errors"
	"strconv"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ctrlplane/pilot/internal/traceid"
	"github.com/ctrlplane/pilot/processor"
)

// metrics are what Prometheus reads.
type metrics struct {
	underWay *prometheus.GaugeVec
	layers   *prometheus.CounterVec
	bytes    *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
}

// newMetrics registers metrics with r, which may be nil.
func newMetrics(r prometheus.Registerer) *metrics {
	with := promauto.With(r)
	m := &metrics{
		underWay: with.NewGaugeVec(prometheus.GaugeOpts{
			Name: "pilot_layers_in_progress", Help: "Layers being unpacked, or waiting to be.",
		}, []string{"encrypted"}),
		layers: with.NewCounterVec(prometheus.CounterOpts{
			Name: "pilot_layers_total", Help: "Layers unpacked, by result, as a gRPC status code: DataLoss if the layer was changed, FailedPrecondition if there is no usable key.",
		}, []string{"encrypted", "result"}),
		bytes: with.NewCounterVec(prometheus.CounterOpts{
			Name: "pilot_layer_bytes_total", Help: "Bytes of the layers that were unpacked, as they are in the registry.",
		}, []string{"encrypted"}),
		seconds: with.NewHistogramVec(prometheus.HistogramOpts{
			Name: "pilot_layer_seconds", Help: "How long layers took to unpack.", Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300},
		}, []string{"encrypted"}),
	}
	// An alert has to see the first one, and a counter that begins with it does
	// not rise.
	for _, result := range []codes.Code{codes.OK, codes.DataLoss, codes.FailedPrecondition} {
		m.layers.WithLabelValues("true", result.String())
	}
	return m
}

// begin counts a layer that is to be unpacked. The caller must call end with its size in
// bytes and the error, which is also logged if the layer is encrypted.
func (m *metrics) begin(layer ocispec.Descriptor) (end func(ctx context.Context, size int64, err error)) {
	encrypted := strconv.FormatBool(processor.IsEncrypted(layer.MediaType))
	m.underWay.WithLabelValues(encrypted).Inc()
	start := time.Now()
	return func(ctx context.Context, size int64, err error) {
		m.underWay.WithLabelValues(encrypted).Dec()
		m.layers.WithLabelValues(encrypted, result(err)).Inc()
		m.seconds.WithLabelValues(encrypted).Observe(time.Since(start).Seconds())
		if err == nil {
			m.bytes.WithLabelValues(encrypted).Add(float64(size))
		}
		if !processor.IsEncrypted(layer.MediaType) || errors.Is(err, context.Canceled) {
			return
		}
		log := logrus.WithFields(logrus.Fields{"digest": layer.Digest, "took": time.Since(start)})
		if id := traceid.Of(ctx); id != "" {
			log = log.WithField("trace", id)
		}
		if err == nil {
			log.WithField("bytes", size).Info("layer decrypted")
			return
		}
		if keks := processor.KEKs(layer); keks != "" {
			log = log.WithField("kek", keks)
		}
		// containerd reports it to the client only, which may be far away.
		log.WithError(err).Warn("layer not decrypted")
	}
}

func result(err error) string {
	if errors.Is(err, context.Canceled) {
		err = context.Canceled
	}
	return status.Code(errgrpc.ToGRPC(err)).String()
}
