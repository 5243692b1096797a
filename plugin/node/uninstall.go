package node

import (
	"errors"
	"path/filepath"
	"slices"
)

// Uninstall puts a machine back as it was before [Plan.Install], byte for
// byte. Files of pilot's that somebody has changed since stay, and are named in
// the error; what was inserted into containerd's configuration is removed even
// if other lines of it were changed. With KeepConfig, pilot's own configuration
// stays.
func Uninstall(o Options) error {
	if err := o.cleanRoot(); err != nil {
		return err
	}
	release, err := o.lock()
	if err != nil {
		return err
	}
	defer release()
	s, err := o.readState()
	if err != nil {
		return err
	}
	var errs []error
	var left []installed
	for _, f := range slices.Backward(s.Files) {
		if o.keeps(f) {
			left = append(left, f)
			continue
		}
		if err := s.undo(o, f); err != nil {
			errs = append(errs, err)
			left = append(left, f)
		}
	}
	slices.Reverse(left)
	if err := o.writeState(state{Files: left, Dirs: s.Dirs}); err != nil {
		errs = append(errs, err)
	}
	o.removeDirs(s.Dirs)
	return errors.Join(errs...)
}

// keeps reports whether a file stays because it is pilot's own configuration.
func (o Options) keeps(f installed) bool {
	return o.KeepConfig && (f.Path == pilotConfig || f.Path == keyProviders)
}

// Installed returns the systemd units of an installation that a machine
// remembers, and whether it remembers something to uninstall.
func Installed(o Options) (units []string, ok bool, err error) {
	if err := o.cleanRoot(); err != nil {
		return nil, false, err
	}
	s, err := o.readState()
	for _, f := range s.Files {
		if f.Link != "" {
			units = append(units, filepath.Base(f.Path))
		}
		ok = ok || !o.keeps(f)
	}
	return units, ok, err
}
