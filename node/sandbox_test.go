package node

import (
	"os"
	"testing"
)

func TestMain(m *testing.M) {
	IsolateRoots()
	os.Exit(m.Run())
}
