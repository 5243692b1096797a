package main

import (
	"github.com/ctrlplane/pilot/keyprovider/brokerconfig"
	"github.com/ctrlplane/pilot/node/sandbox"
	"github.com/ctrlplane/pilot/processor"
)

// The defaults of settings that name sockets.
const (
	defaultListen      = "unix:///run/pilot/keyprovider.sock"
	defaultAdminSocket = "/run/pilot/admin.sock"
	defaultDiffListen  = "unix:///run/pilot/diff.sock"
)

var defaultBroker = brokerconfig.URLs{"unix:///run/copilot/copilot.sock"}

// isolate does the work of a child process that pilot has started as itself, and ends, if
// this is one.
func isolate() {
	processor.IsolatePKCS11()
	sandbox.IsolateRoots()
}
