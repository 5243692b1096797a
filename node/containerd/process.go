package containerd

import (
	"path/filepath"
	"slices"
	"strings"

	"github.com/ctrlplane/pilot/node/host"
)

// configOf returns the configuration file of a containerd.
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
		// A child of containerd has its name until it executes its own program.
		return !daemon || slices.ContainsFunc(named, func(q *host.Process) bool { return q.PID == p.PPID })
	}), nil
}

// flags are the flags of containerd that set its configuration file and its socket.
// Those that are empty were not given.
type flags struct{ config, address string }

// parseFlags reads containerd's command line. daemon is false for commands such as
// "containerd config dump" and "containerd --version".
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
