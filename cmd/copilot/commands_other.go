//go:build !linux

package main

import "github.com/ctrlplane/pilot/internal/commandline"

// A broker runs on Linux. Here is what needs none, or one on another machine.
var (
	acknowledgeCommand = commandline.LinuxOnly("acknowledge", onBroker)
	backupCommand      = commandline.LinuxOnly("backup", onBroker)
	certsCommand       = commandline.LinuxOnly("certs", onBroker)
	enrollCommand      = commandline.LinuxOnly("enroll", onBroker)
	initCommand        = commandline.LinuxOnly("init", onBroker)
	restoreCommand     = commandline.LinuxOnly("restore", onBroker)
	masterCommand      = commandline.LinuxOnly("master", onBroker)
	serveCommand       = commandline.LinuxOnly("serve", onBroker)
	storeCommand       = commandline.LinuxOnly("store", onBroker)
)

const onBroker = "run it on the broker's machine"
