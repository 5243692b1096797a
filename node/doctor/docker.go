package doctor

import (
	"context"
	"slices"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/docker"
)

// docker reports whether Docker pulls encrypted images. The step is left out if there is
// no Docker, or if pilot serves a containerd that is neither the machine's nor Docker's.
// A Docker that can't pull them is a failure only if it runs and the kubelet does not:
// beside Kubernetes it may serve another purpose.
func (e *examination) docker(ctx context.Context) Step {
	d, err := docker.Find(ctx, machine)
	switch {
	case err != nil:
		return failed(err.Error(), "correct Docker's configuration")
	case d == nil || !containerd.SameSocket(e.Containerd, containerd.DefaultAddress) && !containerd.SameSocket(e.Containerd, d.Containerd):
		return Step{}
	}
	detail, fix := d.Advice(e.Containerd)
	if len(fix) == 0 {
		return passed(detail)
	}
	step := failed(detail, fix...)
	if d.PID == 0 || e.hasNamespace(ctx, "k8s.io") {
		step.Result = Skipped
	}
	return step
}

// hasNamespace reports whether containerd has a namespace of that name.
func (e *examination) hasNamespace(ctx context.Context, name string) bool {
	if e.client == nil {
		return false
	}
	list, err := e.client.NamespaceService().List(ctx)
	return err == nil && slices.Contains(list, name)
}
