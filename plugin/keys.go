package plugin

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/processor"
)

// maxLoggedKeys bounds the unusable files that the log names at once.
const maxLoggedKeys = 20

// newKeyDir returns the node's directory of private keys, nil if path is empty.
// Whenever what can be used there changes, the log says so. Its metrics are
// registered with r, which may be nil.
func newKeyDir(path string, r prometheus.Registerer) *processor.KeyDir {
	dir := processor.NewKeyDir(path, logKeys)
	if dir == nil {
		return nil
	}
	if r != nil {
		r.MustRegister(keyCollector{dir})
	}
	// For the log. The file system may not answer, and plain layers do not
	// need it.
	go dir.State(context.Background())
	return dir
}

func logKeys(s processor.KeyDirState) {
	log := logrus.WithField("path", s.Path)
	for i, k := range s.Unusable {
		if i == maxLoggedKeys {
			log.WithField("more", len(s.Unusable)-i).Warn("decryption keys not usable")
			break
		}
		logrus.WithFields(logrus.Fields{"file": k.Path, "reason": k.Reason}).Warn("decryption key not usable")
	}
	log.WithFields(logrus.Fields{"usable": s.Usable, "unusable": len(s.Unusable)}).Info("decryption keys read")
}

// keyCollector has Prometheus read the directory, so that its metrics are right
// also if no layer came since a change.
type keyCollector struct{ *processor.KeyDir }

// collectTimeout is how long a file system may take until the metrics are left
// out.
const collectTimeout = 2 * time.Second

var decryptionKeys = prometheus.NewDesc("pilot_decryption_keys",
	"Files in decryption-keys-path, by whether they can be used to decrypt.", []string{"state"}, nil)

func (c keyCollector) Describe(descs chan<- *prometheus.Desc) { descs <- decryptionKeys }

func (c keyCollector) Collect(metrics chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), collectTimeout)
	defer cancel()
	s, err := c.State(ctx)
	if err != nil {
		return
	}
	metrics <- prometheus.MustNewConstMetric(decryptionKeys, prometheus.GaugeValue, float64(s.Usable), "usable")
	metrics <- prometheus.MustNewConstMetric(decryptionKeys, prometheus.GaugeValue, float64(len(s.Unusable)), "unusable")
}
