package daemonset

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ctrlplane/pilot/node/host"
)

func TestReadOnlySystemsAreToldOfBinDir(t *testing.T) {
	for _, test := range []struct {
		err  error
		want bool
	}{
		{fmt.Errorf("/usr/local/bin/pilot: %w", host.ImmutableError("it is on a read-only file system: mount that writable")), true},
		{fmt.Errorf("mkdir /usr/local/bin: %w", unix.EROFS), true},
		{errors.New("the disk is full"), false},
	} {
		if err := elsewhere(test.err); strings.Contains(err.Error(), "--bin-dir=") != test.want || !errors.Is(err, test.err) {
			t.Errorf("%v", err)
		}
	}
}
