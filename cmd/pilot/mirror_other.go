//go:build !linux

package main

import (
	"context"
	"errors"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/ctrlplane/pilot/internal/commandline"
	"github.com/ctrlplane/pilot/processor"
)

var mirrorCommand = commandline.LinuxOnly("mirror", "run it on Linux, or decrypt images with \"ctr-pilot images decrypt\"")

var errNoMirror = errors.New("mirror-listen: the mirror is for Linux: leave the setting out")

func (c *configuration) serveMirror(context.Context, *errgroup.Group, processor.KeyProvider, prometheus.Registerer) error {
	return errNoMirror
}

func (c *configuration) checkMirror() error {
	if c.MirrorListen != mirrorOff {
		return errNoMirror
	}
	return nil
}
