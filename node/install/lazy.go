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
	lazySocketUnit     = "pilot-lazy.socket"
	// LazySocket is where pilot serves parts of layers to its snapshotter.
	LazySocket = "/run/pilot/lazy.sock"
	// lazyUnit is the drop-in of pilot.service that starts its socket first.
	lazyUnit = "lazy.conf"
)

const lazyUnitText = writtenBy + `[Unit]
Wants=` + lazySocketUnit + `
After=` + lazySocketUnit + "\n"

// isLazyUnit reports whether a unit is only needed to pull lazily.
func isLazyUnit(name string) bool { return name == SnapshotterService || name == lazySocketUnit }

// lazyUnits plans what is needed in systemd besides the units.
func (p *Plan) lazyUnits(before record) error {
	if !p.containerd.Lazy {
		return nil
	}
	return p.own(before, filepath.Join(host.UnitDir, PilotService+".d", lazyUnit), []byte(lazyUnitText), nil)
}

// Lazy reports whether the plan sets up lazy pulling, or finds it set up.
func (p *Plan) Lazy() bool { return p.containerd != nil && p.containerd.Lazy }

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
	if !s.Lazy || o.Root != "" || o.Force {
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
	Options{}.removeDirs([]string{recordDir})
	return nil
}

// checkLazy checks that containerd can pull lazily, if the user or the record says so.
func (p *Plan) checkLazy() error {
	if !p.containerd.Lazy {
		return nil
	}
	if !p.options.HasSystemd() {
		return &host.Conflict{Where: host.UnitDir, What: "there is no systemd to start pilot's snapshotter", Fix: "leave out --lazy"}
	}
	return p.containerd.CheckLazy()
}
