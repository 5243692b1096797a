//go:build !linux

package main

import (
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/commandline"
)

// The defaults of settings that name sockets: other systems have no /run.
const (
	defaultListen      = ""
	defaultAdminSocket = ""
	defaultDiffListen  = off
)

var defaultBroker urls

func commands() []*cli.Command {
	return []*cli.Command{serveCommand, keyproviderCommand,
		commandline.LinuxOnly("node", "a node is a Linux machine: run it there")}
}

func isolate() {}
