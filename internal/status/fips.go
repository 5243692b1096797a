package status

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/ctrlplane/pilot/internal/fips"
)

// FIPS returns a metric of that name: 1, with the process's FIPS 140-3 module and mode.
func FIPS(name string) prometheus.Collector {
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: name, Help: "1, with the FIPS 140-3 module and mode: off, on or only.",
		ConstLabels: prometheus.Labels{"module": fips.Module(), "mode": fips.Mode()},
	})
	info.Set(1)
	return info
}
