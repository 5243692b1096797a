//go:build !linux

package main

import (
	"context"
	"errors"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/ctrlplane/pilot/internal/commandline"
)

var errNoWorkloads = errors.New("workloads-listen: containers are created on Linux only: leave the setting out")

func (c *configuration) serveWorkloads(context.Context, *errgroup.Group, *reloadable, layers, prometheus.Registerer) error {
	return errNoWorkloads
}

func (c *configuration) checkWorkloads() error {
	if c.WorkloadsListen != off {
		return errNoWorkloads
	}
	return nil
}

var nriPluginCommand = commandline.LinuxOnly("nri-plugin", "it is a part of nodes with containerd")
