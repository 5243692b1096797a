package node

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Docker is what is known of a machine's Docker Engine. Docker decrypts images
// if it keeps them in containerd, and if that is the containerd that has pilot.
type Docker struct {
	// Version is dockerd's, such as 26.1.5+dfsg1; empty if it is not known.
	Version string
	// PID is dockerd's process; 0 if it does not run.
	PID int
	// ConfigFile is the path of daemon.json, which need not exist.
	ConfigFile string
	// Containerd is the path of the socket of the containerd that Docker uses.
	Containerd string
	// OwnContainerd says that dockerd starts that containerd, or has it in its
	// own process: nobody else can configure it.
	OwnContainerd bool
	// Store is where Docker keeps images, empty if that is not known, and
	// StoreReason says what decides it.
	Store       ImageStore
	StoreReason string

	major         int
	storageDriver string // as it is set
	embedded      bool   // features.embedded-containerd is true
	hasContainerd bool   // the program is on the machine
}

// ImageStore is where Docker keeps images.
type ImageStore string

const (
	// ContainerdStore is containerd's: its differ unpacks the layers.
	ContainerdStore ImageStore = "containerd"
	// GraphDriverStore is Docker's own, which unpacks layers by itself.
	GraphDriverStore ImageStore = "graph-driver"
)

// graphDrivers are Docker's, by the names of their directories in its data root.
var graphDrivers = []string{"overlay2", "fuse-overlayfs", "btrfs", "zfs", "vfs"}

// LookForDocker finds out about the Docker Engine of a machine: from dockerd if
// it runs, or else from its files. It returns nil if the machine has none.
// Rootless Docker and Docker in a container are none of the machine's.
func LookForDocker(ctx context.Context, o Options) (*Docker, error) {
	if err := o.cleanRoot(); err != nil {
		return nil, err
	}
	running, err := o.processes("dockerd")
	if err != nil {
		return nil, fmt.Errorf("look for Docker among the processes: %w", err)
	}
	if len(running) > 0 {
		p := running[0]
		// The program that runs, even if another was installed since.
		version := o.dockerVersion(ctx, fmt.Sprintf("/proc/%d/exe", p.pid))
		d, s, err := o.examineDocker(version, p.pid, p.args)
		if err != nil {
			return nil, err
		}
		if info, err := o.askDocker(ctx, s); err == nil {
			d.update(info, s)
		}
		return d, nil
	}
	binary := o.lookPath("dockerd", binDirs)
	if binary == "" {
		return nil, nil
	}
	d, _, err := o.examineDocker(o.dockerVersion(ctx, binary), 0, o.dockerUnitArgs())
	return d, err
}

// dockerUnitArgs returns the arguments with which systemd starts dockerd.
func (o Options) dockerUnitArgs() []string {
	words, _ := o.execStart("docker.service")
	return words[min(1, len(words)):]
}

// examineDocker works out what a dockerd with these arguments does when it starts.
func (o Options) examineDocker(version string, pid int, args []string) (*Docker, dockerSettings, error) {
	s, err := o.dockerSettings(args)
	if err != nil {
		return nil, s, err
	}
	d := &Docker{Version: version, PID: pid, ConfigFile: s.configFile, storageDriver: s.StorageDriver}
	d.major, _, _ = parseVersion(version)
	d.embedded = s.Features[embeddedFeature] && d.major >= 29
	d.hasContainerd = o.lookPath("containerd", binDirs) != ""
	d.findContainerd(o, s)
	d.findStore(o, s)
	return d, s, nil
}

// dockerVersion returns dockerd's version; empty if it does not say one.
func (o Options) dockerVersion(ctx context.Context, binary string) string {
	out, err := o.runProgram(ctx, binary, "--version")
	if err != nil {
		return ""
	}
	// Docker version 26.1.5+dfsg1, build 411e817
	_, version, _ := strings.Cut(strings.TrimSpace(string(out)), "version ")
	version, _, _ = strings.Cut(version, ",")
	return version
}

// findContainerd works out which containerd dockerd uses when it starts.
func (d *Docker) findContainerd(o Options, s dockerSettings) {
	own := filepath.Join(s.ExecRoot, "containerd", "containerd.sock")
	_, noSystem := o.stat(defaultAddress)
	_, noOwn := o.stat(own)
	switch {
	case d.embedded:
		d.OwnContainerd = true
	case s.Containerd != "":
		d.Containerd = socketOf(s.Containerd)
	case d.PID != 0:
		d.OwnContainerd = noOwn == nil || noSystem != nil
	default:
		// Its socket comes when containerd.service starts, before dockerd.
		d.OwnContainerd = noSystem != nil && !d.hasContainerd
	}
	switch {
	case d.OwnContainerd:
		d.Containerd = own
	case d.Containerd == "":
		d.Containerd = defaultAddress
	}
}

// findStore works out which store dockerd takes when it starts.
func (d *Docker) findStore(o Options, s dockerSettings) {
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
		if entries, err := o.readDir(dir); err == nil && len(entries) > 0 && name != "vfs" {
			d.Store, d.StoreReason = GraphDriverStore, dir+" is not empty, so Docker 29 stays with it"
			return
		}
	}
	d.Store, d.StoreReason = ContainerdStore, "the default of Docker 29"
}

// graphDriverSet reports whether storage-driver names a graph driver, with which
// the other store does not start.
func (d *Docker) graphDriverSet() bool { return slices.Contains(graphDrivers, d.storageDriver) }

// dockerInfo is the part of the Engine API's GET /info that counts here.
type dockerInfo struct {
	ServerVersion string
	Driver        string
	DriverStatus  [][2]string
	Containerd    *struct{ Address string } // since Docker 27
}

// askDocker asks the running dockerd for its GET /info.
func (o Options) askDocker(ctx context.Context, s dockerSettings) (*dockerInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	socket := "/var/run/docker.sock"
	for _, h := range s.Hosts {
		if path, ok := strings.CutPrefix(h, "unix://"); ok {
			socket = path
			break
		}
	}
	body, _, err := httpGet(ctx, o.path(socket), "/info", maxDockerInfo)
	if err != nil {
		return nil, fmt.Errorf("docker at %s: %w", socket, err)
	}
	var info dockerInfo
	return &info, json.Unmarshal(body, &info)
}

// maxDockerInfo is the most that is read of Docker's answer, in bytes.
const maxDockerInfo = 4 << 20

// update replaces what was worked out from files with what the running dockerd
// reports.
func (d *Docker) update(info *dockerInfo, s dockerSettings) {
	if major, _, err := parseVersion(info.ServerVersion); err == nil {
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
		d.Store, d.StoreReason = store, "it runs so, with the storage driver "+info.Driver+", and was not restarted since its configuration changed"
	}
	if info.Containerd != nil && info.Containerd.Address != "" {
		d.Containerd = socketOf(info.Containerd.Address)
		d.OwnContainerd = strings.HasPrefix(d.Containerd, filepath.Clean(s.ExecRoot)+"/")
	}
}
