package node

import (
	"cmp"
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
	// If what has containerd ask pilot can't be undone, the rest is needed.
	slices.SortStableFunc(s.Files, func(a, b installed) int {
		return cmp.Compare(dropInLast(a), dropInLast(b))
	})
	var errs []error
	var left []installed
	for _, f := range slices.Backward(s.Files) {
		if o.keeps(f) {
			left = append(left, f)
			continue
		}
		if err := s.undo(o, f); err != nil {
			if dropInLast(f) > 0 {
				return err
			}
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

// dropInLast sorts the file that has containerd ask pilot after all others.
func dropInLast(f installed) int {
	if filepath.Base(f.Path) == dropInName && f.Path != pilotConfig || f.Path == crioDropIn {
		return 1
	}
	return 0
}

// keeps reports whether a file stays because it is pilot's own configuration.
func (o Options) keeps(f installed) bool {
	return o.KeepConfig && (f.Path == pilotConfig || f.Path == keyProviders)
}

// Connected reports whether the configuration that has containerd ask pilot is
// still there.
func Connected(o Options) bool {
	s, err := o.readState()
	return err != nil || slices.ContainsFunc(s.Files, func(f installed) bool { return dropInLast(f) > 0 })
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
