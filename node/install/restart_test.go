package install

import (
	"errors"
	"io/fs"
	"slices"
	"testing"

	"github.com/ctrlplane/pilot/node/host"
)

func TestServicesThatAreOwedLaterStayPending(t *testing.T) {
	o := Options{Host: host.Host{Root: t.TempDir()}}
	if err := o.owe([]string{"containerd.service", PilotService}); err != nil {
		t.Fatal(err)
	}
	restarted := Pending(o.Host)
	if err := o.owe([]string{"k3s.service"}); err != nil {
		t.Fatal(err)
	}
	if err := o.Restarted(restarted); err != nil {
		t.Error(err)
	}
	left := Pending(o.Host)
	if !slices.Equal(left, []string{"k3s.service"}) {
		t.Errorf("pending: %q", left)
	}
	if err := o.Restarted(left); err != nil {
		t.Error(err)
	}
	if _, err := o.Lstat(pendingDir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is left: %v", pendingDir, err)
	}
}
