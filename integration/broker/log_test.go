package broker

import (
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestPilotCountsLayerKeysInItsLog has layer keys wrapped and unwrapped, and reads what
// pilot logs of it by the time it ends: a line each at level debug, and at info one for all,
// besides those of what failed.
func TestPilotCountsLayerKeysInItsLog(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	_, url := harness.StartBroker(t, dir, "team-a")
	for level, each := range map[string]int{"info": 0, "debug": 1} {
		p, _ := harness.StartPilot(t, dir+"/"+level, url, "--log-level", level, "--admin-listen", "off")
		k := harness.NewPilotClient(t, dir+"/"+level)
		const wraps, unwraps = 2, 3
		var annotation []byte
		for range wraps {
			var err error
			if annotation, err = k.Wrap(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		for range unwraps {
			if err := k.Unwrap(t.Context(), annotation); err != nil {
				t.Fatal(err)
			}
		}
		if err := k.Unwrap(t.Context(), []byte(strings.Replace(string(annotation), "team-a", "team-b", 1))); err == nil {
			t.Error("unwrapped with a KEK that is not there")
		}
		p.Stop(t)
		for text, want := range map[string]int{
			`"layer key wrapped"`:   each * wraps,
			`"layer key unwrapped"`: each * unwraps,
			`level=info msg="layer keys wrapped and unwrapped" keks="team-a: 5" unwrapped=3 wrapped=2`: 1,
			`level=warning msg="request failed"`: 1,
		} {
			if got := p.Logged(t, text); got != want {
				t.Errorf("level %s: %d lines have %s, want %d:\n%s", level, got, text, want, harness.Read(t, p.Log))
			}
		}
	}
}
