package containerd

import (
	"path/filepath"
	"slices"
	"strings"

	"github.com/ctrlplane/pilot/node/host"
)

// configOf returns the path of the configuration file that a containerd was started
// with.
func configOf(p *host.Process) string {
	f, _ := parseFlags(p.Args)
	switch {
	case f.config == "":
		return DefaultConfig
	case filepath.IsAbs(f.config):
		return f.config
	}
	return filepath.Join(p.Dir, f.config)
}

// running returns the containerds that run on this machine.
func running() ([]*host.Process, error) {
	named, err := host.Host{}.Processes("containerd")
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(named, func(p *host.Process) bool {
		_, daemon := parseFlags(p.Args)
		// What containerd starts goes by its name until it is another program.
		return !daemon || slices.ContainsFunc(named, func(q *host.Process) bool { return q.PID == p.PPID })
	}), nil
}

// flags are the options of containerd's command line that decide what it reads
// and where it answers. What is empty was not given.
type flags struct{ config, address string }

// parseFlags reads a command line of containerd's. It reports false for one that
// starts no daemon, such as "containerd config dump" and "containerd --version".
func parseFlags(args []string) (f flags, daemon bool) {
	for i := 0; i < len(args); i++ {
		name, isFlag := strings.CutPrefix(args[i], "-")
		if !isFlag {
			return f, false
		}
		name, value, hasValue := strings.Cut(strings.TrimPrefix(name, "-"), "=")
		switch name {
		case "config", "c", "address", "a", "root", "state", "log-level", "l":
			if !hasValue && i+1 < len(args) {
				i++
				value = args[i]
			}
		}
		switch name {
		case "version", "v", "help", "h":
			return f, false
		case "config", "c":
			f.config = value
		case "address", "a":
			f.address = value
		}
	}
	return f, true
}
