package keyprovider

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/copilot/client"
)

var (
	errDown = fmt.Errorf("%w: it is away", client.ErrUnavailable)
	errNo   = fmt.Errorf("%w: go away", client.ErrForbidden)
	errGone = fmt.Errorf("%w: deleted", client.ErrNotFound)
)

func newGraceful(idle time.Duration) *counted {
	c := newCounted(10*time.Second, idle, 10)
	c.grace = time.Minute
	return c
}

func (c *counted) pass(d time.Duration) { c.clock = c.clock.Add(d) }

// warnings returns what is logged until the test ends.
func warnings(t *testing.T) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	before := logrus.StandardLogger().Out
	logrus.SetOutput(&b)
	t.Cleanup(func() { logrus.SetOutput(before) })
	return &b
}

// TestGrace goes on with what is known while the broker is away, and asks it
// again now and then.
func TestGrace(t *testing.T) {
	for _, version := range []int{0, 5} {
		log := warnings(t)
		c := newGraceful(0)
		c.expect(t, "a", version, 1)
		c.err = errDown
		c.pass(10 * time.Second)
		for range 10 {
			c.expect(t, "a", version, 2) // one layer waits for the broker
		}
		c.pass(outageTTL)
		c.expect(t, "a", version, 3)
		c.expect(t, "a", version, 3)
		if n := strings.Count(log.String(), "past its kek-cache-ttl"); n != 1 {
			t.Errorf("%d warnings, want one for the outage: %s", n, log)
		}

		// It is back, and is away again.
		c.err = nil
		c.pass(outageTTL)
		c.expect(t, "a", version, 4)
		c.err = errDown
		c.pass(10 * time.Second)
		c.expect(t, "a", version, 5)
		if n := strings.Count(log.String(), "past its kek-cache-ttl"); n != 2 {
			t.Errorf("%d warnings, want one more for another outage: %s", n, log)
		}
		c.pass(time.Minute - 1)
		c.expect(t, "a", version, 6)
		c.pass(1)
		c.fail(t, "a", version, 6) // the grace is over
		c.pass(errorTTL)
		c.fail(t, "a", version, 7)
	}
}

// TestNoGrace checks that no KEK is used past its ttl when the broker does not
// let us, nor in an outage that follows, nor if there is no grace.
func TestNoGrace(t *testing.T) {
	for name, test := range map[string]struct {
		answer  error
		version int
		spared  bool // the other version is still good
	}{
		"forbidden":             {errNo, 5, false},
		"forbidden, current":    {errNo, 0, false},
		"deleted":               {errGone, 0, false},
		"no such version":       {errGone, 5, true},
		"neither: it is broken": {fmt.Errorf("something else"), 5, true},
	} {
		c := newGraceful(0)
		c.expect(t, "a", 0, 1)
		c.expect(t, "a", 4, 2)
		c.expect(t, "b", 4, 3)
		c.pass(10 * time.Second)
		c.err = test.answer
		c.fail(t, "a", test.version, 4)
		c.pass(outageTTL)
		c.err = errDown
		c.expect(t, "b", 4, 5)
		if test.spared {
			c.expect(t, "a", 4, 6)
			continue
		}
		for i, version := range []int{0, 4, 5} {
			c.fail(t, "a", version, int32(6+i))
		}
		for key := range c.entries {
			if key.id == "a" {
				t.Errorf("%s: version %d is still in memory", name, key.version)
			}
		}
	}
	c := newCounted(10*time.Second, 0, 10)
	c.expect(t, "a", 5, 1)
	c.err = errDown
	c.pass(10 * time.Second)
	c.fail(t, "a", 5, 2)
}

// TestGraceSweep checks how long a KEK stays in memory that nobody uses.
func TestGraceSweep(t *testing.T) {
	for _, test := range []struct{ idle, lasts time.Duration }{{0, 70 * time.Second}, {30 * time.Second, 30 * time.Second}} {
		c := newGraceful(test.idle)
		c.expect(t, "a", 5, 1)
		key := c.entries[cacheKey{"a", 5}].Value.(*cacheEntry).kek.Key
		c.pass(test.lasts - 1)
		c.sweep()
		if key[0] != 'a' {
			t.Errorf("idle %s: it is cleared too early", test.idle)
		}
		c.pass(1)
		c.sweep()
		if key[0] != 0 || len(c.entries) != 0 {
			t.Errorf("idle %s: it is still in memory", test.idle)
		}
	}
	c := newGraceful(0)
	c.err = errDown
	c.fail(t, "a", 5, 1)
	c.pass(outageTTL)
	c.sweep()
	if len(c.failed) != 0 {
		t.Error("the outage is still remembered")
	}
}

// TestGraceOfCurrent fetches the current version by its number, which keeps it
// the one to go on with.
func TestGraceOfCurrent(t *testing.T) {
	c := newGraceful(0)
	c.expect(t, "a", 0, 1)
	c.pass(10 * time.Second)
	c.expect(t, "a", 5, 2)
	c.err = errDown
	c.pass(5 * time.Second)
	c.expect(t, "a", 0, 3)
	c.expect(t, "a", 5, 3)
	c.pass(55 * time.Second) // since it was known that 5 is current
	c.fail(t, "a", 0, 4)
	c.expect(t, "a", 5, 5)
}

// TestGraceAtOnce has many layers ask when the broker has just gone away: they
// wait for one answer together.
func TestGraceAtOnce(t *testing.T) {
	c := newGraceful(0)
	c.expect(t, "a", 5, 1)
	c.pass(10 * time.Second)
	var fetches atomic.Int32
	c.fetch = func(context.Context, string, int) (client.KEK, error) {
		fetches.Add(1)
		time.Sleep(50 * time.Millisecond)
		return client.KEK{}, errDown
	}
	done := make(chan error, 50)
	for range cap(done) {
		go func() {
			kek, err := c.get(t.Context(), "a", 5)
			if err == nil && string(kek.Key) != "a" {
				err = fmt.Errorf("got %+v", kek)
			}
			clear(kek.Key)
			done <- err
		}()
	}
	for range cap(done) {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if n := fetches.Load(); n != 1 {
		t.Errorf("the broker was asked %d times", n)
	}
}
