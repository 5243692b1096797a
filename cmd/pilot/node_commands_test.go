//go:build linux

package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/install"
)

func TestUninstallCommandsLeaveOutWhatIsStopped(t *testing.T) {
	had := install.Installation{Service: "k3s.service", Units: []string{"pilot-diff.socket", "pilot.service"}}
	for name, test := range map[string]struct {
		stopped []string
		want    []string
	}{
		"running":            {nil, []string{"systemctl daemon-reload", "systemctl try-restart k3s.service", "systemctl stop pilot-diff.socket pilot.service"}},
		"containerd is gone": {[]string{"k3s.service"}, []string{"systemctl daemon-reload", "systemctl stop pilot-diff.socket pilot.service"}},
		"the socket stopped": {[]string{"pilot-diff.socket"}, []string{"systemctl daemon-reload", "systemctl try-restart k3s.service", "systemctl stop pilot.service"}},
		"all stopped":        {append(had.Units, "k3s.service"), []string{"systemctl daemon-reload"}},
	} {
		got := uninstallCommands(had, func(unit string) bool { return slices.Contains(test.stopped, unit) }, false)
		if !slices.Equal(got, test.want) {
			t.Errorf("%s: %q", name, got)
		}
	}
}

// TestUninstallRemovesSnapshotsWithARemovedProgram has a node on which a DaemonSet has
// installed pilot's program.
func TestUninstallRemovesSnapshotsWithARemovedProgram(t *testing.T) {
	for _, test := range []struct {
		had     install.Installation
		program string
	}{
		{install.Installation{Lazy: containerd.LazyOn, Program: true}, "/proc/self/exe"},
		{install.Installation{LazyLeft: true, Program: true}, "/proc/self/exe"},
		{install.Installation{Lazy: containerd.LazyOn}, thisProgram()},
	} {
		commands := uninstallCommands(test.had, func(string) bool { return false }, true)
		if got, want := commands[len(commands)-1], test.program+" snapshotter --remove --force"; got != want {
			t.Errorf("%+v: %q, want %q", test.had, got, want)
		}
	}
}

// TestCleaningUpComesAfterTheRestarts checks that nothing is restarted again if what may fail
// for long does.
func TestCleaningUpComesAfterTheRestarts(t *testing.T) {
	pending := []string{install.PilotService, containerd.Service}
	for _, is := range []install.Installation{{Lazy: containerd.LazyOn}, {Lazy: containerd.LazyEnding}, {LazyLeft: true}, {}} {
		restarts, afterwards := installCommands(is, pending, false)
		if !slices.Contains(restarts, "systemctl restart "+containerd.Service) || strings.Contains(strings.Join(restarts, "\n"), thisProgram()) {
			t.Errorf("%+v: restarts: %q", is, restarts)
		}
		if (len(afterwards) == 1) != is.LazyPresent() {
			t.Errorf("%+v: afterwards: %q", is, afterwards)
		}
	}
}
