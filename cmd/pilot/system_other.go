//go:build !linux

package main

import (
	"github.com/ctrlplane/pilot/internal/commandline"
)

// The defaults of settings that name sockets: other systems have no /run.
const (
	defaultListen      = ""
	defaultAdminSocket = ""
	defaultDiffListen  = off
)

var defaultBroker urls

var nodeCommand = commandline.LinuxOnly("node", "run it on the node")

func isolate() {}
