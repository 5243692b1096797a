// Command idleplugin is an NRI plugin that allows every container, to compare pilot's with.
package main

import (
	"context"
	"log"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
)

type plugin struct{}

func (plugin) Configure(context.Context, string, string, string) (events stub.EventMask, _ error) {
	events.Set(api.Event_VALIDATE_CONTAINER_ADJUSTMENT)
	return events, nil
}

func (plugin) ValidateContainerAdjustment(context.Context, *api.ValidateContainerAdjustmentRequest) error {
	return nil
}

func main() {
	s, err := stub.New(plugin{})
	if err == nil {
		err = s.Run(context.Background())
	}
	if err != nil {
		log.Fatal(err)
	}
}
