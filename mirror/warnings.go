package mirror

import (
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
)

// warningInterval is how often warnings of the server are summed up.
const warningInterval = time.Minute

// warnings logs what [http.Server] reports, such as failed handshakes, which any user of the
// machine can cause as often as they like: the first, and then how many followed.
type warnings struct {
	mu    sync.Mutex
	timer *time.Timer // until the next sum; nil if there was no warning for the interval
	count int         // since the last line
	last  string
}

// Write takes one warning, as [log.Logger] writes it.
func (w *warnings) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	text := strings.TrimSpace(string(b))
	if w.timer == nil {
		w.timer = time.AfterFunc(warningInterval, w.sum)
		logrus.WithField("listener", "mirror").Warn(text)
		return len(b), nil
	}
	w.count, w.last = w.count+1, text
	return len(b), nil
}

// sum logs how many warnings had no line of their own.
func (w *warnings) sum() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.count == 0 {
		w.timer = nil
		return
	}
	logrus.WithFields(logrus.Fields{"listener": "mirror", "warnings": w.count, "last": w.last}).Warn("more warnings of this kind")
	w.count = 0
	w.timer.Reset(warningInterval)
}
