package install

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"strings"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/node/host"
)

// Files that a DaemonSet adds to an installation.
const (
	// DaemonSetMark marks an installation that is removed with its DaemonSet.
	DaemonSetMark = recordDir + "/daemonset"
	// BrokerToken and BrokerCA are copies of the pod's files. The CA's certificates have
	// to exist when pilot starts, which is before the pod does.
	BrokerToken = "/run/pilot/broker-token"
	BrokerCA    = "/etc/pilot/broker-ca.pem"
)

// Put writes a file on the machine as part of an installation, so that uninstalling
// removes it. If the file changes, it notes services to restart.
func Put(ctx context.Context, o Options, path string, content []byte, mode fs.FileMode, restart ...string) error {
	release, err := o.lock()
	if err != nil {
		return err
	}
	defer release()
	before, _, err := o.loadRecord()
	if err != nil {
		return err
	}
	p := &Plan{options: o, before: &before}
	if err := p.ownMode(before, path, content, mode, nil); err != nil {
		return err
	}
	if len(p.Changes) == 0 {
		return nil
	}
	if err := o.owe(restart); err != nil {
		return err
	}
	if err := p.Install(ctx); err != nil {
		return err
	}
	logrus.WithField("file", path).Info("file written on the node")
	return nil
}

// maxInstalled is the most that a file of an installation may have, in bytes. The largest
// are pilot's own programs.
const maxInstalled = 256 << 20

// readInstalled returns the content of a file that may be one of an installation.
func (o Options) readInstalled(name string) ([]byte, error) {
	return o.ReadFileAtMost(name, maxInstalled)
}

// MissingUnits returns the files of an installation in systemd's directory that are gone: pilot
// would not start with the machine, or "pilot node refresh" not run before containerd.
func MissingUnits(o Options) (paths []string) {
	s, err := o.readRecord()
	if err != nil {
		return nil // Recorded reports it
	}
	for _, f := range s.Files {
		if _, err := o.Lstat(f.Path); strings.HasPrefix(f.Path, host.UnitDir+"/") && errors.Is(err, fs.ErrNotExist) {
			paths = append(paths, f.Path)
		}
	}
	return paths
}

// Intact reports whether all installed files exist, with a drop-in that is not empty.
func Intact(o Options) bool {
	s, err := o.readRecord()
	return err == nil && Connected(o) && !slices.ContainsFunc(s.Files, func(f installed) bool {
		if isDropIn(f.Path) {
			text, err := o.ReadFile(f.Path)
			return err != nil || strings.HasPrefix(string(text), leftOut)
		}
		return !o.Has(f.Path)
	})
}
