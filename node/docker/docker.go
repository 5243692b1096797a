// Package docker finds a machine's Docker Engine, and works out whether it pulls
// encrypted images.
package docker

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/host"
)

// Engine describes a machine's Docker Engine. Docker decrypts images if it keeps them in
// containerd, and if that containerd has pilot.
type Engine struct {
	// Version is dockerd's, such as 26.1.5+dfsg1; empty if unknown.
	Version string
	// PID is dockerd's process; 0 if it does not run.
	PID int
	// ConfigFile is the path of daemon.json, which need not exist.
	ConfigFile string
	// Containerd is the path of the socket of the containerd that Docker uses.
	Containerd string
	// OwnContainerd is true if dockerd starts that containerd, or runs it in its own
	// process: it can't be configured.
	OwnContainerd bool
	// Store is where Docker keeps images, empty if unknown, and StoreReason says what
	// decides it.
	Store       ImageStore
	StoreReason string

	major         int
	storageDriver string // as set
	embedded      bool   // features.embedded-containerd is true
	hasContainerd bool   // the program is on the machine
}

// ImageStore is where Docker keeps images.
type ImageStore string

const (
	// ContainerdStore is containerd, whose differ unpacks layers.
	ContainerdStore ImageStore = "containerd"
	// GraphDriverStore is Docker's own, which unpacks layers itself.
	GraphDriverStore ImageStore = "graph-driver"
)

// graphDrivers are Docker's graph drivers. Each has a directory of that name in the data
// root.
var graphDrivers = []string{"overlay2", "fuse-overlayfs", "btrfs", "zfs", "vfs"}

// Find describes the machine's Docker Engine: from dockerd if it runs, or else from its
// files. It returns nil if the machine has none. Rootless Docker and Docker in a
// container do not count.
func Find(ctx context.Context, h host.Host) (*Engine, error) {
	running, err := h.Processes("dockerd")
	if err != nil {
		return nil, fmt.Errorf("search the processes for Docker: %w", err)
	}
	if len(running) > 0 {
		p := running[0]
		// The program that runs, even if it was upgraded since.
		version := askVersion(ctx, h, fmt.Sprintf("/proc/%d/exe", p.PID))
		d, s, err := examine(h, version, p.PID, p.Args)
		if err != nil {
			return nil, err
		}
		if info, err := ask(ctx, h, s); err == nil {
			d.update(info, s)
		}
		return d, nil
	}
	binary := h.LookPath("dockerd")
	if binary == "" {
		return nil, nil
	}
	d, _, err := examine(h, askVersion(ctx, h, binary), 0, unitArgs(h))
	return d, err
}

// unitArgs returns the arguments with which systemd starts dockerd.
func unitArgs(h host.Host) []string {
	words, _ := h.ExecStart("docker.service")
	return words[min(1, len(words)):]
}

// examine works out from files what a dockerd with these arguments does.
func examine(h host.Host, version string, pid int, args []string) (*Engine, settings, error) {
	s, err := readSettings(h, args)
	if err != nil {
		return nil, s, err
	}
	d := &Engine{Version: version, PID: pid, ConfigFile: s.configFile, storageDriver: s.StorageDriver}
	d.major, _, _, _ = containerd.ParseVersion(version)
	d.embedded = s.Features[embeddedFeature] && d.major >= 29
	d.hasContainerd = h.LookPath("containerd") != ""
	d.findContainerd(h, s)
	d.findStore(h, s)
	return d, s, nil
}

// askVersion returns dockerd's version; empty if it prints none.
func askVersion(ctx context.Context, h host.Host, binary string) string {
	out, err := h.Run(ctx, binary, "--version")
	if err != nil {
		return ""
	}
	// Docker version 26.1.5+dfsg1, build 411e817
	_, version, _ := strings.Cut(strings.TrimSpace(string(out)), "version ")
	version, _, _ = strings.Cut(version, ",")
	return version
}

// findContainerd works out which containerd dockerd uses.
func (d *Engine) findContainerd(h host.Host, s settings) {
	own := filepath.Join(s.ExecRoot, "containerd", "containerd.sock")
	_, noSystem := h.Stat(containerd.DefaultAddress)
	_, noOwn := h.Stat(own)
	switch {
	case d.embedded:
		d.OwnContainerd = true
	case s.Containerd != "":
		d.Containerd = containerd.SocketPath(s.Containerd)
	case d.PID != 0:
		d.OwnContainerd = noOwn == nil || noSystem != nil
	default:
		// containerd.service makes its socket before dockerd starts.
		d.OwnContainerd = noSystem != nil && !d.hasContainerd
	}
	switch {
	case d.OwnContainerd:
		d.Containerd = own
	case d.Containerd == "":
		d.Containerd = containerd.DefaultAddress
	}
}

// findStore works out which store dockerd uses.
func (d *Engine) findStore(h host.Host, s settings) {
	on, set := s.Features[snapshotterFeature]
	switch {
	case set && on:
		d.Store, d.StoreReason = ContainerdStore, "features."+snapshotterFeature+" is true"
		return
	case set:
		d.Store, d.StoreReason = GraphDriverStore, "features."+snapshotterFeature+" is false"
		return
	case d.major == 0:
		return
	case d.major < 29:
		d.Store, d.StoreReason = GraphDriverStore, "the default before Docker 29"
		return
	case d.graphDriverSet():
		d.Store, d.StoreReason = GraphDriverStore, "storage-driver is "+s.StorageDriver
		return
	}
	for _, name := range graphDrivers {
		dir := filepath.Join(s.DataRoot, name)
		if entries, err := h.ReadDir(dir); err == nil && len(entries) > 0 && name != "vfs" {
			d.Store, d.StoreReason = GraphDriverStore, dir+" is not empty, so Docker 29 keeps using it"
			return
		}
	}
	d.Store, d.StoreReason = ContainerdStore, "the default of Docker 29"
}

// graphDriverSet reports whether storage-driver names a graph driver, which the
// containerd store does not support.
func (d *Engine) graphDriverSet() bool { return slices.Contains(graphDrivers, d.storageDriver) }

// info is the part of the Engine API's GET /info that is used here.
type info struct {
	ServerVersion string
	Driver        string
	DriverStatus  [][2]string
	Containerd    *struct{ Address string } // since Docker 27
}

// ask sends GET /info to the running dockerd.
func ask(ctx context.Context, h host.Host, s settings) (*info, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	socket := "/var/run/docker.sock"
	for _, h := range s.Hosts {
		if path, ok := strings.CutPrefix(h, "unix://"); ok {
			socket = path
			break
		}
	}
	body, _, err := host.HTTPGet(ctx, h.Path(socket), "/info", maxInfo)
	if err != nil {
		return nil, fmt.Errorf("docker at %s: %w", socket, err)
	}
	var info info
	return &info, json.Unmarshal(body, &info)
}

// maxInfo bounds what is read of Docker's response, in bytes.
const maxInfo = 4 << 20

// update replaces what was worked out from files with what the running dockerd reports.
func (d *Engine) update(info *info, s settings) {
	if major, _, _, err := containerd.ParseVersion(info.ServerVersion); err == nil {
		d.Version, d.major = info.ServerVersion, major
	}
	store := GraphDriverStore
	for _, s := range info.DriverStatus {
		if s[0] == "driver-type" && strings.HasPrefix(s[1], "io.containerd.snapshotter.") {
			store = ContainerdStore
		}
	}
	switch d.Store {
	case store:
	case "":
		d.Store, d.StoreReason = store, "its storage driver is "+info.Driver
	default:
		d.Store, d.StoreReason = store, "it runs with the storage driver "+info.Driver+", and was not restarted since its configuration changed"
	}
	if info.Containerd != nil && info.Containerd.Address != "" {
		d.Containerd = containerd.SocketPath(info.Containerd.Address)
		d.OwnContainerd = strings.HasPrefix(d.Containerd, filepath.Clean(s.ExecRoot)+"/")
	}
}
