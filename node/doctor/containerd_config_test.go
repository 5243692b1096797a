package doctor

import (
	"slices"
	"testing"

	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	"github.com/containerd/containerd/v2/plugins"

	"github.com/ctrlplane/pilot/node/containerd"
)

// TestDoctorNamesDiffersThatAreGoneOrHidden has lists of differs on containerd 1.7.
func TestDoctorNamesDiffersThatAreGoneOrHidden(t *testing.T) {
	with := func(order ...any) map[string]any {
		return map[string]any{
			"plugins":       map[string]any{containerd.DiffService: map[string]any{"default": order}},
			"proxy_plugins": map[string]any{"pilot": map[string]any{}, "added": map[string]any{}},
		}
	}
	loaded := plugged{all: []*introspection.Plugin{{Type: string(plugins.DiffPlugin), ID: "walking"}, {Type: string(plugins.SnapshotPlugin), ID: "gone"}}}
	const gone, hidden = "the diff service has the differ gone, which does not exist: after a restart containerd could not pull images", "pilot's drop-in hides the differ added"
	for name, test := range map[string]struct {
		plain, dump map[string]any
		want        []string
	}{
		"as it should be": {with("walking"), with("pilot", "walking"), nil},
		"another tool's":  {with("added", "walking"), with("pilot", "added", "walking"), nil},
		"gone":            {with("walking"), with("pilot", "gone", "walking"), []string{gone}},
		"hidden":          {with("added", "walking"), with("pilot", "walking"), []string{hidden}},
	} {
		e := &examination{Doctor: &Doctor{}, running: &containerd.Instance{Major: 1, Minor: 7, Plain: test.plain}, dump: test.dump}
		if wrong := e.lists(loaded); !slices.Equal(wrong, test.want) {
			t.Errorf("%s: %q", name, wrong)
		}
	}
}

func TestDoctorNamesASnapshotterThatPilotReplaces(t *testing.T) {
	for name, want := range map[string]Result{"overlayfs": Skipped, containerd.LazySnapshotter: Skipped, "native": Failed} {
		plain := map[string]any{"plugins": map[string]any{containerd.CRIImages: map[string]any{"snapshotter": name}}}
		e := &examination{Doctor: &Doctor{}, running: &containerd.Instance{Major: 2, Minor: 2, Plain: plain, Lazy: containerd.LazyOn}, dump: map[string]any{}}
		if step := e.lazy(t.Context()); step.Result != want {
			t.Errorf("%s: %+v", name, step)
		}
	}
}
