//go:build !linux

package main

import (
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"github.com/ctrlplane/pilot/processor"
)

func (c *configuration) diffServer(processor.KeyProvider, prometheus.Registerer) (*grpc.Server, error) {
	return nil, errNoDiffer
}
