package doctor

import (
	"crypto/x509"
	"testing"
	"time"
)

// TestDoctorWarnsOfCertificatesInTime: certificates that are replaced by themselves have less
// than 14 days all the time.
func TestDoctorWarnsOfCertificatesInTime(t *testing.T) {
	const day = 24 * time.Hour
	now := time.Now()
	for life, want := range map[time.Duration]time.Duration{time.Hour: 15 * time.Minute, 7 * day: 42 * time.Hour, 10 * day: 14 * day, 365 * day: 14 * day} {
		if got := warnTime(&x509.Certificate{NotBefore: now, NotAfter: now.Add(life)}); got != want {
			t.Errorf("%s: it warns %s before, and not %s", life, got, want)
		}
	}
}
