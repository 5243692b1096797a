package install

import (
	"context"
	"io/fs"
	"slices"

	"github.com/sirupsen/logrus"
)

// What a DaemonSet adds to an installation.
const (
	// DaemonSetMark says that the installation is a DaemonSet's, and so goes with it.
	DaemonSetMark = stateDir + "/daemonset"
	// Where the machine has what comes from the pod. The CA's certificates have to
	// be there when pilot starts, before the pod does.
	BrokerToken = "/run/pilot/broker-token"
	BrokerCA    = "/etc/pilot/broker-ca.pem"
)

// Put puts a file on the machine as part of an installation, so uninstalling
// removes it, and notes the services that have to be restarted then.
func Put(ctx context.Context, o Options, path string, content []byte, mode fs.FileMode, restart ...string) error {
	release, err := o.lock()
	if err != nil {
		return err
	}
	defer release()
	before, _, err := o.loadState()
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

// Intact reports whether all that was installed is there.
func Intact(o Options) bool {
	s, err := o.readState()
	return err == nil && Connected(o) && !slices.ContainsFunc(s.Files, func(f installed) bool {
		if isDropIn(f.Path) {
			text, err := o.ReadFile(f.Path)
			return err != nil || string(text) == leftOut
		}
		return !o.Has(f.Path)
	})
}
