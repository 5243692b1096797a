//go:build !linux

package main

import (
	"context"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
)

// layers is nothing where there is no differ.
type layers struct{}

func (c *configuration) openLayers(context.Context, *errgroup.Group, *reloadable) (layers, error) {
	return layers{}, nil
}

func (layers) handle(*http.ServeMux) {}

func (c *configuration) diffServer(*reloadable, layers, prometheus.Registerer) (*grpc.Server, error) {
	return nil, errNoDiffer
}
