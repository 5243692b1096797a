package install

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/node/host"
)

// lock locks out other installations on the machine until it is released.
func (o Options) lock() (release func(), err error) {
	if release, err = o.tryLock(); err != nil || release != nil {
		return release, err
	}
	f, err := o.lockFile()
	if err != nil {
		return nil, err
	}
	logrus.WithField("lock", f.Name()).Info("waiting for another installation on this machine")
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return func() { f.Close() }, nil
}

// tryLock is lock, but returns a nil release if another installation runs.
func (o Options) tryLock() (release func(), err error) {
	f, err := o.lockFile()
	if err != nil {
		return nil, err
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err == nil {
		return func() { f.Close() }, nil
	}
	f.Close()
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return nil, nil
	}
	return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
}

// lockFile opens the file to lock: on a running machine, one that only root can lock; in
// a root directory, one that exists already, so that nothing is left there.
func (o Options) lockFile() (*os.File, error) {
	name, flags := "/etc", os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_DIRECTORY
	if o.Root == "" || o.Root == host.MachineRoot {
		name, flags = "/run/pilot-install.lock", os.O_RDWR|os.O_CREATE
	}
	var f *os.File
	err := o.InRoot(name, func(root *os.Root, name string) (err error) {
		f, err = root.OpenFile(name, flags, 0o600)
		return err
	})
	return f, err
}
