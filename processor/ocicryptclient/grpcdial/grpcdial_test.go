package grpcdial

import (
	"testing"

	"github.com/ctrlplane/pilot/processor/ocicryptclient/transporttest"
)

func TestCall(t *testing.T) { transporttest.Run(t, Call) }
