package status

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/internal/certfile"
)

// certificates is a metric of when certificates expire.
type certificates struct {
	desc  *prometheus.Desc
	files func() map[string]string
}

// Certificates returns a metric of that name: when each certificate of a file
// expires, in seconds since 1970. Its label cert is the setting that names the
// file, files returns the file for each. Of several certificates in a file the one that
// expires first counts. Files are read for each scrape, and one that can't be read
// is left out.
func Certificates(name string, files func() map[string]string) prometheus.Collector {
	return &certificates{
		prometheus.NewDesc(name, "When the certificate expires, in seconds since 1970, by the setting that names its file.", []string{"cert"}, nil),
		files,
	}
}

func (c *certificates) Describe(descs chan<- *prometheus.Desc) { descs <- c.desc }

func (c *certificates) Collect(metrics chan<- prometheus.Metric) {
	for setting, name := range c.files() {
		if name == "" {
			continue
		}
		expires, err := notAfter(name)
		if err != nil {
			logrus.WithError(err).WithField("certificate", name).Warn("certificate not read")
			continue
		}
		metrics <- prometheus.MustNewConstMetric(c.desc, prometheus.GaugeValue, float64(expires.Unix()), setting)
	}
}

// notAfter returns when the first of the certificates in a file in PEM expires.
func notAfter(name string) (time.Time, error) {
	certs, err := certfile.Certificates(name)
	if err != nil {
		return time.Time{}, err
	}
	first := certs[0].NotAfter
	for _, cert := range certs {
		if cert.NotAfter.Before(first) {
			first = cert.NotAfter
		}
	}
	return first, nil
}
