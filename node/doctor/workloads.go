package doctor

import (
	"context"
	"slices"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/host"
)

var reinstallWorkloads = []string{"pilot node install --workloads --now"}

// workloads checks that containerd asks pilot about each container, if the node is set up
// so.
func (e *examination) workloads(context.Context) Step {
	installed := exists(e.running.PluginPath())
	if e.Workloads == "" {
		if installed {
			return failed("workloads-listen is off in "+e.Configuration+", and containerd's plugin asks there: no container of an encrypted image is created", reinstallWorkloads...)
		}
		return Step{}
	}
	if _, wrong := e.socket(e.Workloads); wrong != nil {
		return *wrong
	}
	if !installed {
		return failed(e.running.PluginPath()+" does not exist: containerd does not ask pilot, and creates containers of encrypted images for every workload", reinstallWorkloads...)
	}
	if e.dump != nil {
		if missing := e.running.NotAsking(e.dump); missing != "" {
			return failed(e.running.Config+": "+missing, reinstallWorkloads...)
		}
	}
	if e.running.Process != nil {
		plugins, err := machine.Processes("pilot")
		if err != nil {
			return failed(err.Error())
		}
		if !slices.ContainsFunc(plugins, e.isPlugin) {
			does := "creates containers of encrypted images for every workload"
			if e.running.RequiresPlugins() {
				does = "creates no container"
			}
			return failed("containerd's plugin "+containerd.PluginFile+" does not run, and containerd "+does, e.restartContainerd(), "journalctl -u "+e.running.Service+" -n 30")
		}
	}
	return passed("containerd asks pilot about each container")
}

// isPlugin reports whether the examined containerd has started a process as pilot's plugin.
func (e *examination) isPlugin(p *host.Process) bool {
	return p.PPID == e.running.Process.PID && slices.Equal(p.Args, []string{"nri-plugin", e.running.PluginPath()})
}
