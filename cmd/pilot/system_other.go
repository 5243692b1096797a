//go:build !linux

package main

import (
	"github.com/ctrlplane/pilot/internal/commandline"
	"github.com/ctrlplane/pilot/keyprovider/brokerconfig"
)

// The defaults of settings that name sockets: other systems have no /run.
const (
	defaultListen      = ""
	defaultAdminSocket = ""
	defaultDiffListen  = off
)

var defaultBroker brokerconfig.URLs

var nodeCommand = commandline.LinuxOnly("node", "run it on the node")

func isolate() {}
