package keyprovider

import (
	"context"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"google.golang.org/grpc/codes"

	"github.com/ctrlplane/pilot/copilot/client"
)

// Metrics are those of a [Provider] and of those that replace it. Results are gRPC's
// status codes, as in google.golang.org/grpc/codes.
type Metrics struct {
	requests      *prometheus.CounterVec
	seconds       *prometheus.HistogramVec
	broker        *prometheus.CounterVec
	brokerSeconds *prometheus.HistogramVec
	lookups       *prometheus.CounterVec
	cached        prometheus.Gauge
	uses          uses
}

// The operations with a layer key.
const (
	opWrap   = "wrap"
	opUnwrap = "unwrap"
)

// buckets range from a lookup in memory to the longest wait.
var buckets = []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}

// NewMetrics registers metrics with r, which may be nil.
func NewMetrics(r prometheus.Registerer) *Metrics {
	with := promauto.With(r)
	m := &Metrics{
		cached: with.NewGauge(prometheus.GaugeOpts{
			Name: "pilot_keks_cached", Help: "Versions of KEKs in memory.",
		}),
		requests: with.NewCounterVec(prometheus.CounterOpts{
			Name: "pilot_key_requests_total", Help: "Requests to wrap or unwrap a layer key, by result.",
		}, []string{"operation", "result"}),
		seconds: with.NewHistogramVec(prometheus.HistogramOpts{
			Name: "pilot_key_request_seconds", Help: "How long requests to wrap or unwrap a layer key took.", Buckets: buckets,
		}, []string{"operation"}),
		broker: with.NewCounterVec(prometheus.CounterOpts{
			Name: "pilot_broker_requests_total", Help: "Requests to the brokers, by result: for a KEK (kek), or to wrap or unwrap a layer key. Tries at several brokers count once.",
		}, []string{"operation", "result"}),
		brokerSeconds: with.NewHistogramVec(prometheus.HistogramOpts{
			Name: "pilot_broker_request_seconds", Help: "Time until a broker answered, or all had failed.", Buckets: buckets,
		}, []string{"operation"}),
		lookups: with.NewCounterVec(prometheus.CounterOpts{
			Name: "pilot_kek_lookups_total", Help: "KEKs looked up, by source: memory (hit), memory past kek-cache-ttl because no broker answered (stale), the broker (miss), or none because the broker recently said that it does not export the KEK (not-exported) or why it refuses it (refused).",
		}, []string{"outcome"}),
	}
	for _, outcome := range []string{outcomeHit, outcomeStale, outcomeMiss, outcomeNotExported, outcomeRefused} {
		m.lookups.WithLabelValues(outcome)
	}
	// An alert must see the first failure, and a counter that starts with it does not
	// rise.
	for _, result := range []codes.Code{codes.OK, codes.PermissionDenied, codes.NotFound, codes.FailedPrecondition} {
		m.requests.WithLabelValues("unwrap", result.String())
	}
	for _, result := range []codes.Code{codes.OK, codes.Unavailable, codes.DeadlineExceeded} {
		m.broker.WithLabelValues("kek", result.String())
	}
	return m
}

// The outcomes of looking for a KEK.
const (
	outcomeHit         = "hit"
	outcomeStale       = "stale"
	outcomeMiss        = "miss"
	outcomeNotExported = "not-exported"
	outcomeRefused     = "refused"
)

// request counts a request that began at start.
func (m *Metrics) request(ctx context.Context, operation string, start time.Time, err error) {
	if isProbe(ctx) {
		return
	}
	m.requests.WithLabelValues(operation, code(err).String()).Inc()
	m.seconds.WithLabelValues(operation).Observe(time.Since(start).Seconds())
}

// asked counts a request to the brokers that began at start.
func (m *Metrics) asked(ctx context.Context, operation string, start time.Time, err error) {
	if isProbe(ctx) {
		return
	}
	result := code(err)
	if errors.Is(err, client.ErrNotExported) {
		result = codes.OK // the broker wraps and unwraps instead
	}
	m.broker.WithLabelValues(operation, result.String()).Inc()
	m.brokerSeconds.WithLabelValues(operation).Observe(time.Since(start).Seconds())
}
