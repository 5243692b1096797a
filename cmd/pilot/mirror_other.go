//go:build !linux

package main

import (
	"context"
	"errors"
	"net"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/ctrlplane/pilot/internal/commandline"
)

var snapshotterCommand = commandline.LinuxOnly("snapshotter", "it is a part of nodes with containerd")

var mirrorCommand = commandline.LinuxOnly("mirror", "run it on Linux, or decrypt images with \"ctr-pilot images decrypt\"")

var errNoMirror = errors.New("mirror-listen and lazy-listen: the mirror is for Linux: leave the settings out")

func (c *configuration) serveMirror(context.Context, *errgroup.Group, *reloadable, layers, prometheus.Registerer, socketPath, []net.Listener) error {
	return errNoMirror
}

func (c *configuration) checkMirror() error {
	if c.MirrorListen != mirrorOff || c.LazyListen != off {
		return errNoMirror
	}
	return nil
}
