package mirror

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// stream is work that moves so many bytes in each second until it is ended.
type stream struct {
	*work
	ended bool
}

func newStream(registry string, rate int64) *stream {
	began := time.Now()
	s := &stream{}
	s.work = &work{registry: registry, end: func() { s.ended = true }, moved: func() int64 {
		return rate * int64(time.Since(began)/time.Second)
	}}
	return s
}

// take takes a turn that is there.
func take(t *testing.T, all *turns, w *work) (leave func()) {
	t.Helper()
	began := time.Now()
	leave, err := all.enter(t.Context(), w)
	if err != nil || time.Since(began) > 0 {
		t.Fatalf("no turn for %v: %v", time.Since(began), err)
	}
	return leave
}

func TestSlowestStreamLosesItsTurnWhileOthersWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all := &newStreams(4).turns
		slow := []*stream{newStream("a", 1000), newStream("a", 10), newStream("b", 20_000)}
		fast := newStream("b", 1<<20)
		var leave []func()
		for _, s := range append(slow, fast) {
			leave = append(leave, take(t, all, s.work))
		}
		time.Sleep(time.Hour)
		for _, s := range append(slow, fast) {
			if s.ended {
				t.Fatalf("a stream was ended while none waited")
			}
		}
		waited := make(chan time.Duration)
		go func() {
			began := time.Now()
			leave, err := all.enter(t.Context(), newStream("c", 1<<20).work)
			if err != nil {
				t.Error(err)
			} else {
				defer leave()
			}
			waited <- time.Since(began)
		}()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if !slow[1].ended || slow[0].ended || slow[2].ended || fast.ended {
			t.Errorf("ended: %v %v %v, and the fast one %v; want the slowest", slow[0].ended, slow[1].ended, slow[2].ended, fast.ended)
		}
		leave[1]()
		if took := <-waited; took > 3*time.Second {
			t.Errorf("it waited for %v", took)
		}
		for _, i := range []int{0, 2, 3} {
			leave[i]()
		}
		synctest.Wait()
		if len(all.held) > 0 || len(all.count) > 0 {
			t.Errorf("held: %v, %v", all.held, all.count)
		}
	})
}

// TestStreamThatStopsLosesItsTurn has a stream whose rate is high in all, and nothing now.
func TestStreamThatStopsLosesItsTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all := &newStreams(1).turns
		ended := make(chan time.Time, 1)
		defer take(t, all, &work{registry: "a", moved: func() int64 { return 1 << 30 }, end: func() { ended <- time.Now() }})()
		time.Sleep(time.Second)
		began := time.Now()
		go all.enter(t.Context(), newStream("b", 0).work)
		if took := (<-ended).Sub(began); took > 3*streamPatience {
			t.Errorf("it kept its turn for %v", took)
		}
	})
}

func TestRegistryLeavesTurnsToOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all := &turns{most: 8, registryMost: 6, patience: time.Hour}
		for range 6 {
			defer take(t, all, newStream("a", 0).work)()
		}
		ctx, cancel := context.WithCancel(t.Context())
		seventh := make(chan error)
		go func() {
			_, err := all.enter(ctx, newStream("a", 0).work)
			seventh <- err
		}()
		synctest.Wait()
		for range 2 {
			defer take(t, all, newStream("b", 0).work)()
		}
		cancel()
		if err := <-seventh; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		_, err := all.enter(t.Context(), newStream("c", 0).work)
		if !errors.Is(err, errBusy) || all.waiting.Len() > 0 || len(all.held) != 8 {
			t.Errorf("%v, %d wait, %d held", err, all.waiting.Len(), len(all.held))
		}
	})
}

// TestWorkWithoutARateIsEndedOnceItTakesLong, as the making of an image of a registry that
// sends it byte by byte, beside others.
func TestWorkWithoutARateIsEndedOnceItTakesLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all := &turns{most: 2, registryMost: 2, patience: time.Minute}
		var ended atomic.Int32
		first := &work{registry: "a", end: func() { ended.Add(1) }}
		leave := take(t, all, first)
		time.Sleep(30 * time.Second)
		defer take(t, all, &work{registry: "b", end: func() { t.Error("the newer one was ended") }})()
		time.Sleep(20 * time.Second)
		done := make(chan error)
		go func() {
			leave, err := all.enter(t.Context(), &work{registry: "c"})
			if err == nil {
				leave()
			}
			done <- err
		}()
		time.Sleep(9 * time.Second)
		if ended.Load() > 0 {
			t.Error("it was ended before its time")
		}
		time.Sleep(4 * time.Second)
		if ended.Load() != 1 {
			t.Errorf("it was ended %d times", ended.Load())
		}
		leave()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
