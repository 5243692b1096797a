package auditing

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/copilot/audit"
)

// refuse notes n refused requests of a caller, and returns how many get their own lines.
func refuse(r *refusals, who, reason string, n int, many bool) (lines int) {
	for range n {
		if r.note(who, audit.Entry{Action: "export", Verdict: audit.Denied, Status: 403, Reason: reason, From: "192.0.2.1:1"}, many) {
			lines++
		}
	}
	return lines
}

func TestRefusalsBeyondTheBurstAreSummedUpByCallerAndReason(t *testing.T) {
	var written []audit.Entry
	r := &refusals{write: func(e audit.Entry) error {
		written = append(written, e)
		return nil
	}}
	if n := refuse(r, "uid:1", "no rule", 1000, false); n < refusalBurst || n > refusalBurst+10 {
		t.Errorf("%d lines for 1000 refusals", n)
	}
	if n := refuse(r, "uid:2", "no rule", 1, false) + refuse(r, "uid:1", "revoked", 1, false); n != 2 {
		t.Errorf("another caller's, and another reason's, first refusals have %d lines", n)
	}
	if n := refuse(r, "uid:3", "too many requests", 1000, true); n != 1 {
		t.Errorf("%d lines for requests over the limit", n)
	}
	r.look(time.Now(), false)
	if len(written) > 0 {
		t.Errorf("summed up while the bursts go on: %+v", written)
	}
	r.look(time.Now().Add(sumInterval+maxSumDelay), false)
	counts := make(map[string]int64)
	for _, e := range written {
		reason, _, _ := strings.Cut(e.Reason, " (")
		counts[reason] += e.Count
	}
	if len(written) != 2 || counts["no rule"] < 1000-refusalBurst-10 || counts["too many requests"] != 999 {
		t.Errorf("sums: %+v", written)
	}
}

func TestSumsThatCanNotBeWrittenAreKept(t *testing.T) {
	fails := true
	var sum int64
	r := &refusals{write: func(e audit.Entry) error {
		if fails {
			return errors.New("no space left on device")
		}
		sum += e.Count
		return nil
	}}
	refuse(r, "uid:1", "too many requests", 100, true)
	r.look(time.Now(), true)
	fails = false
	r.look(time.Now(), true)
	if sum != 99 {
		t.Errorf("%d refusals are in the audit log, want 99", sum)
	}
}

// TestSumOfManyKindsSaysForHowManyKEKs has a caller guess names: one line says how many
// it tried since the last.
func TestSumOfManyKindsSaysForHowManyKEKs(t *testing.T) {
	for names, want := range map[int][]string{
		300:  {"for 171 different KEKs,", "for 172 different KEKs,"}, // besides 128 kinds, and the first of the rest
		5000: {"for 1024 or more different KEKs,", "for 1024 or more different KEKs,"},
	} {
		var sums []string
		r := &refusals{write: func(e audit.Entry) error {
			if strings.Contains(e.Reason, "last of several kinds") {
				sums = append(sums, e.Reason)
			}
			return nil
		}}
		for range want {
			for i := range names {
				r.note("uid:1", audit.Entry{Action: "info", Verdict: audit.Denied, Status: 403, KEK: fmt.Sprint("team-", i), From: "@"}, false)
			}
			r.look(time.Now(), true)
		}
		if len(sums) != len(want) || !strings.Contains(sums[0], want[0]) || !strings.Contains(sums[1], want[1]) {
			t.Errorf("%d names: %q, want %q", names, sums, want)
		}
	}
}
