package install

import (
	"fmt"
	"path/filepath"
	"regexp"

	"github.com/ctrlplane/pilot/node/containerd"
)

// WorkloadsSocket is where pilot decides for its NRI plugin.
const WorkloadsSocket = "/run/pilot/workloads.sock"

// nriPlugin plans the program that containerd starts as a plugin: a file that makes the
// kernel start pilot. It is removed if the node does not ask about workloads any more.
func (p *Plan) nriPlugin(before record) error {
	path := p.containerd.PluginPath()
	for _, f := range before.Files {
		if isNRIPlugin(f.Path) && (!p.containerd.Workloads || f.Path != path) {
			if err := p.remove(before, f.Path, "containerd is not to ask about workloads from there any more"); err != nil {
				return err
			}
		}
	}
	if !p.containerd.Workloads {
		return nil
	}
	return p.ownMode(before, path, nriPluginText(p.options.PilotBinary), 0o755, nil)
}

// isNRIPlugin reports whether a file of an installation is pilot's NRI plugin.
func isNRIPlugin(path string) bool { return filepath.Base(path) == containerd.PluginFile }

func nriPluginText(pilot string) []byte {
	return fmt.Appendf(nil, "#!%s nri-plugin\n%s", pilot, writtenBy)
}

var nriPluginFile = regexp.MustCompile("^#!/[^ \n]+ nri-plugin\n" + regexp.QuoteMeta(writtenBy) + "$")
