package workloads

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/plugin/imagekeys"
)

const (
	ttl   = 10 * time.Second
	grace = time.Hour
)

var (
	web         = use{kek: imagekeys.KEK{ID: "team-a", Version: 1}, workload: "prod/web", labels: map[string]string{"tier": "gold", "pod": "web-0"}}
	errRefused  = fmt.Errorf("403: %w", client.ErrForbidden)
	errNoBroker = fmt.Errorf("connection refused: %w", client.ErrUnavailable)
)

// broker gives the answer that is set, and its clock is set by hand.
type broker struct {
	verdicts
	answer  error
	depends []string // on the labels of these keys
	asked   atomic.Int32
	clock   time.Time
}

func newBroker() *broker {
	b := &broker{clock: time.Unix(1e9, 0)}
	b.now = func() time.Time { return b.clock }
	b.ask = func(context.Context, use) ([]string, error) {
		b.asked.Add(1)
		return b.depends, b.answer
	}
	return b
}

func (b *broker) expect(t *testing.T, want error, asked int32) {
	t.Helper()
	b.expectFor(t, web, want, asked)
}

func (b *broker) expectFor(t *testing.T, u use, want error, asked int32) {
	t.Helper()
	b.asked.Store(0)
	if err := b.allowed(t.Context(), u, ttl, grace); !errors.Is(err, want) || (err == nil) != (want == nil) {
		t.Errorf("%v, want %v", err, want)
	}
	if n := b.asked.Load(); n != asked {
		t.Errorf("the broker was asked %d times, want %d", n, asked)
	}
}

func TestVerdictIsUsedForItsTTL(t *testing.T) {
	b := newBroker()
	b.expect(t, nil, 1)
	b.answer = errRefused
	b.clock = b.clock.Add(ttl - 1)
	b.expect(t, nil, 0)
	b.clock = b.clock.Add(1)
	b.expect(t, client.ErrForbidden, 1)
	b.expect(t, client.ErrForbidden, 0)
	b.answer = nil
	b.clock = b.clock.Add(refusalTTL)
	b.expect(t, nil, 1)
}

func TestEarlierPermissionCountsDuringAnOutageUntilItsGraceEnds(t *testing.T) {
	b := newBroker()
	b.answer = errNoBroker
	b.expect(t, client.ErrUnavailable, 1)
	b.expect(t, client.ErrUnavailable, 0) // it was asked just now
	b.clock = b.clock.Add(outageTTL)
	b.answer = nil
	b.expect(t, nil, 1)
	b.answer = errNoBroker
	b.clock = b.clock.Add(ttl)
	b.expect(t, nil, 1)
	b.clock = b.clock.Add(grace - 1)
	b.expect(t, nil, 1)
	b.clock = b.clock.Add(outageTTL)
	b.expect(t, client.ErrUnavailable, 1)
}

func TestRefusalEndsTheGrace(t *testing.T) {
	b := newBroker()
	b.expect(t, nil, 1)
	b.answer = errRefused
	b.clock = b.clock.Add(ttl)
	b.expect(t, client.ErrForbidden, 1)
	b.answer = errNoBroker
	b.clock = b.clock.Add(refusalTTL)
	b.expect(t, client.ErrUnavailable, 1)
}

func TestConcurrentContainersAskOnce(t *testing.T) {
	b := newBroker()
	all := make(chan struct{})
	b.ask = func(context.Context, use) ([]string, error) {
		b.asked.Add(1)
		<-all
		return nil, nil
	}
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			if err := b.allowed(t.Context(), web, ttl, grace); err != nil {
				t.Error(err)
			}
		})
	}
	for b.asked.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	close(all)
	wg.Wait()
	if n := b.asked.Load(); n != 1 {
		t.Errorf("the broker was asked %d times", n)
	}
}

func TestSlowAnswerCountsForTheNextContainer(t *testing.T) {
	b := newBroker()
	slow := make(chan struct{})
	b.ask = func(context.Context, use) ([]string, error) { <-slow; return nil, nil }
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := b.allowed(ctx, web, ttl, grace); !errors.Is(err, errNoAnswerYet) {
		t.Errorf("%v", err)
	}
	// Others do not wait as long as they could: this test would not end.
	if err := b.allowed(t.Context(), web, ttl, grace); !errors.Is(err, errNoAnswerYet) {
		t.Errorf("%v", err)
	}
	close(slow)
	if err := b.allowed(t.Context(), web, ttl, grace); err != nil && !errors.Is(err, errNoAnswerYet) {
		t.Error(err)
	}
}

// labelled returns the use of a pod with other labels.
func labelled(labels map[string]string) use {
	u := web
	u.labels = labels
	return u
}

func TestVerdictsAreSharedByPodsWhoseLabelsMakeNoDifference(t *testing.T) {
	silver, other := map[string]string{"tier": "silver"}, map[string]string{"tier": "gold", "pod": "web-1"}
	b := newBroker()
	b.expect(t, nil, 1)
	for _, labels := range []map[string]string{silver, other, {}, nil} {
		b.expectFor(t, labelled(labels), nil, 0)
	}
	// The policy has a rule with labels now.
	b.clock = b.clock.Add(ttl)
	b.depends = []string{"app", "tier"}
	b.expect(t, nil, 1)
	b.expectFor(t, labelled(other), nil, 0)
	b.answer = errRefused
	for _, labels := range []map[string]string{silver, {}, nil, {"tier": "gold", "app": ""}, {"app": "gold"}} {
		b.expectFor(t, labelled(labels), client.ErrForbidden, 1)
	}
	b.expect(t, nil, 0)
	// Nor are permissions for other labels used in an outage.
	b.answer = errNoBroker
	b.clock = b.clock.Add(ttl)
	b.expect(t, nil, 1)
	b.expectFor(t, labelled(other), nil, 0)
	b.expectFor(t, labelled(silver), client.ErrUnavailable, 1)
	b.expectFor(t, labelled(nil), client.ErrUnavailable, 1)
}

// A pod that has waited for the answer to another asks again if that turns out to depend on
// labels that they do not share.
func TestAnswerThatDependsOnOtherLabelsIsNotShared(t *testing.T) {
	b := newBroker()
	b.expect(t, nil, 1) // which depends on none
	b.clock = b.clock.Add(ttl)
	begun, all := make(chan struct{}), make(chan struct{})
	b.ask = func(_ context.Context, u use) ([]string, error) {
		if b.asked.Add(1) == 2 {
			close(begun)
			<-all
		}
		if u.labels["tier"] != "gold" {
			return nil, errRefused
		}
		return []string{"tier"}, nil
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := b.allowed(t.Context(), web, ttl, grace); err != nil {
			t.Error(err)
		}
	})
	<-begun
	waiting := make(chan struct{}, 50)
	for range cap(waiting) {
		wg.Go(func() {
			waiting <- struct{}{}
			if err := b.allowed(t.Context(), labelled(map[string]string{"tier": "silver"}), ttl, grace); !errors.Is(err, client.ErrForbidden) {
				t.Errorf("silver: %v", err)
			}
		})
	}
	for len(waiting) < cap(waiting) {
		time.Sleep(time.Millisecond)
	}
	close(all)
	wg.Wait()
}

func TestMemoryOfVerdictsIsBounded(t *testing.T) {
	b := newBroker()
	for i := range 3 * maxVerdicts {
		if err := b.allowed(t.Context(), use{kek: web.kek, workload: fmt.Sprintf("ns-%d/", i), labels: web.labels}, ttl, grace); err != nil {
			t.Fatal(err)
		}
		if n := max(len(b.known), len(b.labelKeys)); n > maxVerdicts {
			t.Fatalf("%d verdicts", n)
		}
	}
}

func TestValidatorsAreKnownByTheVersion(t *testing.T) {
	for version, want := range map[[2]string]bool{
		{"1.7.24~ds1", "unknown"}: false, {"v1.7.30", "v0.8.0"}: false, {"2.1.6", "unknown"}: false, {"2.0.7", "v0.8.0"}: false,
		{"2.2.9+unknown", "v0.8.0"}: true, {"unknown", "v0.12.0"}: true, {"v2.2.0", "v0.10.0"}: true, {"2.4.2", "v0.12.3"}: true, {"3.0.0", ""}: true, {"unknown", "unknown"}: false,
	} {
		if got := hasValidators(version[0], version[1]); got != want {
			t.Errorf("%v: %v", version, got)
		}
	}
}

func TestImageVolumesAreFoundByTheirPath(t *testing.T) {
	const volume = "/run/containerd/io.containerd.grpc.v1.cri/image-volumes/pod/0123456789abcdef"
	for source, want := range map[string]string{
		volume:                  volume,
		volume + "/sub/x":       volume,
		volume + "/../01234/./": strings.TrimSuffix(volume, "56789abcdef"),
		"/run/containerd/io.containerd.grpc.v1.cri/image-volumes/other/0123456789abcdef": "",
		"/etc/hosts": "",
	} {
		got, ok := imageVolume(source, "pod")
		if ok != (want != "") || got != want {
			t.Errorf("%s: %s, %v", source, got, ok)
		}
	}
}
