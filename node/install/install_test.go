package install

import (
	"slices"
	"testing"
)

// TestWhatStartsPilotComesFirst checks the order of changes, after any of which an installation
// may be killed.
func TestWhatStartsPilotComesFirst(t *testing.T) {
	old := []byte("x")
	p := &Plan{Changes: []Change{
		{Path: "drop-in"}, {Path: "config.toml", Old: old},
		{Path: "pilot.toml", Old: old}, {Path: "unit"}, {Path: "link", Link: "unit"}, {Path: "old link", Link: "old unit", Remove: true}, {Path: "old unit", Old: old, Remove: true},
	}}
	p.startFirst(2)
	var order []string
	for _, c := range p.Changes {
		order = append(order, c.Path)
	}
	if want := []string{"unit", "link", "drop-in", "config.toml", "pilot.toml", "old link", "old unit"}; !slices.Equal(order, want) {
		t.Errorf("%q", order)
	}
}
