package install

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/host"
)

const (
	// SnapshotterService is the systemd service of pilot's snapshotter.
	SnapshotterService = "pilot-snapshotter.service"
	// LazySocketUnit is the systemd unit of LazySocket.
	LazySocketUnit = "pilot-lazy.socket"
	// LazySocket is where pilot serves parts of layers to its snapshotter.
	LazySocket = "/run/pilot/lazy.sock"
	// lazyUnit is the drop-in of pilot.service that starts its socket first.
	lazyUnit = "lazy.conf"
)

const lazyUnitText = writtenBy + `[Unit]
Wants=` + LazySocketUnit + `
After=` + LazySocketUnit + "\n"

// isLazyUnit reports whether a unit is only needed to pull lazily.
func isLazyUnit(name string) bool { return name == SnapshotterService || name == LazySocketUnit }

// lazyUnits plans what is needed in systemd besides the units, or, without pilot's
// snapshotter, the removal of what was set up for it.
func (p *Plan) lazyUnits(before record) error {
	dropIn := filepath.Join(host.UnitDir, PilotService+".d", lazyUnit)
	if p.Lazy() != containerd.LazyOff {
		return p.own(before, dropIn, []byte(lazyUnitText), nil)
	}
	for _, f := range before.Files {
		switch {
		case f.Link != "" && isLazyUnit(filepath.Base(f.Path)):
			if to, err := p.options.Readlink(f.Path); err == nil && to == f.Link {
				p.Changes = append(p.Changes, Change{Path: f.Path, Link: f.Link, Remove: true})
			}
		case f.Path == dropIn || filepath.Dir(f.Path) == host.UnitDir && isLazyUnit(filepath.Base(f.Path)):
			if err := p.remove(before, f.Path, "lazy pulling is being switched off"); err != nil {
				return err
			}
		}
	}
	return nil
}

// Lazy returns what the machine has pilot's snapshotter for, once the plan is carried out.
func (p *Plan) Lazy() containerd.LazyMode {
	if p.containerd == nil {
		return containerd.LazyOff
	}
	return p.containerd.Lazy
}

// lazyMode returns what pilot's snapshotter is to be for, of a machine that has it for had.
func (o Options) lazyMode(had containerd.LazyMode) containerd.LazyMode {
	switch {
	case o.Lazy != nil && *o.Lazy:
		return containerd.LazyOn
	case had == containerd.LazyOn && o.Lazy != nil && o.Root != "":
		return containerd.LazyOff // nothing runs there
	case had == containerd.LazyOn && o.Lazy != nil:
		return containerd.LazyEnding
	case had == containerd.LazyEnding && (o.LazyUnused || o.Root != ""):
		return containerd.LazyOff
	}
	return had
}

// lazyMode returns what the machine has pilot's snapshotter for.
func (s *record) lazyMode() containerd.LazyMode {
	switch {
	case s.Lazy && s.LazyEnding:
		return containerd.LazyEnding
	case s.Lazy:
		return containerd.LazyOn
	}
	return containerd.LazyOff
}

// lazyLeft reports whether pilot's snapshotter may have left snapshots.
func (s *record) lazyLeft() bool { return !s.Lazy && s.LazyEnding }

func (s *record) setLazy(mode containerd.LazyMode, o Options) {
	left := mode == containerd.LazyOff && (s.Lazy || s.LazyEnding) && o.Root == ""
	s.Lazy, s.LazyEnding = mode != containerd.LazyOff, mode == containerd.LazyEnding || left
}

// LazyInUse is the error of an Uninstall while containers use pilot's snapshotter.
type LazyInUse struct {
	Containers []string // as NAMESPACE/ID
}

func (e *LazyInUse) Error() string {
	const most = 20
	shown := e.Containers[:min(most, len(e.Containers))]
	more := ""
	if n := len(e.Containers) - len(shown); n > 0 {
		more = fmt.Sprintf(" and %d more", n)
	}
	return fmt.Sprintf("these containers run from pilot's snapshotter, and would lose their files: %s%s", strings.Join(shown, ", "), more)
}

// checkLazyUse returns a [LazyInUse] if pilot's snapshotter was set up, and containers of
// this machine have their files in it.
func (o Options) checkLazyUse(s record) error {
	if s.lazyMode() == containerd.LazyOff || o.Root != "" || o.Force {
		return nil
	}
	return lazyInUse()
}

func lazyInUse() error {
	mounts, err := os.ReadFile("/proc/1/mountinfo")
	if err != nil {
		return err
	}
	if used := lazyContainers(mounts); len(used) > 0 {
		return &LazyInUse{used}
	}
	return nil
}

// lazyContainers returns the containers whose root file systems are overlays of pilot's
// snapshots, by a /proc/PID/mountinfo. containerd mounts them at
// …/io.containerd.runtime.v2.task/NAMESPACE/ID/rootfs.
func lazyContainers(mountinfo []byte) (used []string) {
	for line := range bytes.Lines(mountinfo) {
		fields := strings.Fields(string(line))
		if len(fields) < 5 || !strings.Contains(string(line), "="+containerd.LazyRoot+"/") {
			continue
		}
		at := fields[4]
		if dir, isRoot := strings.CutSuffix(at, "/rootfs"); isRoot {
			at = filepath.Base(filepath.Dir(dir)) + "/" + filepath.Base(dir)
		}
		used = append(used, at)
	}
	slices.Sort(used)
	return slices.Compact(used)
}

// RemoveSnapshots removes the snapshots and caches of pilot's snapshotter, which must not
// run, from this machine. Unless force is true, the error is a [LazyInUse] if containers
// have their files there.
func RemoveSnapshots(force bool) error {
	if conn, err := net.Dial("unix", containerd.LazySocket); err == nil {
		conn.Close()
		return fmt.Errorf("pilot's snapshotter is running: run \"systemctl stop %s\" first", SnapshotterService)
	}
	if !force {
		if err := lazyInUse(); err != nil {
			return err
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var errs []error
	lines := bufio.NewScanner(bytes.NewReader(mounts))
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) > 4 && strings.HasPrefix(fields[4], containerd.LazyRoot+"/") {
			errs = append(errs, named(fields[4], unix.Unmount(fields[4], unix.MNT_DETACH)))
		}
	}
	if err := errors.Join(append(errs, lines.Err())...); err != nil {
		return err
	}
	// It may be the mount point of a disk.
	if err := os.RemoveAll(containerd.LazyRoot); err != nil && !errors.Is(err, unix.EBUSY) {
		return err
	}
	return Options{}.lazyRemoved()
}

// lazyRemoved notes that pilot's snapshotter has left nothing.
func (o Options) lazyRemoved() error {
	release, err := o.lock()
	if err != nil {
		return err
	}
	defer release()
	o.removeDirs([]string{recordDir})
	s, err := o.readRecord()
	if err != nil || !s.lazyLeft() {
		return err
	}
	s.LazyEnding = false
	return o.writeRecord(s)
}

// checkLazy checks that containerd can pull lazily, if the user or the record says so.
func (p *Plan) checkLazy() error {
	if p.Lazy() != containerd.LazyOn {
		return nil
	}
	if !p.options.HasSystemd() {
		return &host.Conflict{Where: host.UnitDir, What: "there is no systemd to start pilot's snapshotter", Fix: "leave out --lazy"}
	}
	return p.containerd.CheckLazy()
}
