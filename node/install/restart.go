package install

import (
	"errors"
	"path/filepath"
	"slices"

	"github.com/ctrlplane/pilot/node/host"
)

// pendingDir has a file for each service that still has to be restarted. If an
// installation is interrupted before that, the next one restarts them. A reboot restarts
// everything, and empties /run.
const pendingDir = "/run/pilot-restart"

// PilotService is pilot's systemd service.
const PilotService = "pilot.service"

// owe notes services that have to be restarted.
func (o Options) owe(services []string) error {
	var errs []error
	for _, s := range services {
		errs = append(errs, o.MkdirAll(pendingDir, 0o755), o.WriteFile(filepath.Join(pendingDir, s), nil, 0o644))
	}
	return errors.Join(errs...)
}

// forgive undoes owe.
func (o Options) forgive(services []string) error {
	var errs []error
	for _, s := range services {
		errs = append(errs, host.IgnoreNotExist(o.Remove(filepath.Join(pendingDir, s))))
	}
	return errors.Join(errs...)
}

// Pending returns the services that have to be restarted for an installation to take
// effect, in that order.
func Pending(h host.Host) []string {
	entries, err := h.ReadDir(pendingDir)
	if err != nil {
		return nil
	}
	var services []string
	for _, e := range entries {
		services = append(services, e.Name())
	}
	// containerd asks pilot, so pilot is first.
	if i := slices.Index(services, PilotService); i > 0 {
		services = slices.Insert(slices.Delete(services, i, i+1), 0, PilotService)
	}
	return services
}

// Restarted notes that [Pending] services were restarted.
func (o Options) Restarted(services []string) error {
	err := o.forgive(services)
	o.removeDirs([]string{pendingDir}) // unless others have to be since
	return err
}
