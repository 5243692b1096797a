package containerd

import (
	"fmt"
	"maps"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/node/host"
)

// pilot's snapshotter in containerd, for lazy pulling.
const (
	LazySnapshotter = "pilot-lazy"
	LazySocket      = "/run/pilot/snapshotter.sock"
	// LazyRoot is the directory of its snapshots.
	LazyRoot = "/var/lib/pilot/snapshotter"
)

// LazyMode says what pilot's snapshotter is for.
type LazyMode int

const (
	// LazyOff is without it.
	LazyOff LazyMode = iota
	// LazyEnding keeps it for the containers that have it, and for no others.
	LazyEnding
	// LazyOn has it for all new containers of the kubelet's.
	LazyOn
)

// annotationsExport makes the transfer service pass the image and the layer of a snapshot
// to its snapshotter.
const annotationsExport = "enable_remote_snapshot_annotations"

// CheckLazy returns an error if pilot's snapshotter can't take the place of the one that
// the kubelet's images have.
func (c *Instance) CheckLazy() error {
	switch {
	case !c.UsesDiffer():
		return &host.Conflict{Where: c.Program, What: fmt.Sprintf("containerd %d.%d can't pull encrypted images lazily", c.Major, c.Minor), Fix: "upgrade containerd to 1.7 or later, or leave out --lazy"}
	case c.Major == 1 && c.Minor == 7 && c.Patch >= 0 && c.Patch < 16:
		// Its CRI ignores the root that a proxy plugin exports.
		return &host.Conflict{Where: c.Program, What: fmt.Sprintf("with containerd 1.7.%d the kubelet can't see images in pilot's snapshotter, so it never deletes them when the disk fills up", c.Patch), Fix: "upgrade containerd to 1.7.16 or later, or switch lazy pulling off (--lazy=false)"}
	case c.Snapshotter() != "overlayfs" && c.Snapshotter() != LazySnapshotter:
		return &host.Conflict{Where: c.Config, What: "the kubelet's images have the snapshotter " + c.Snapshotter(), Fix: "make it overlayfs, which pilot's then replaces, or leave out --lazy"}
	}
	return nil
}

// criSection returns the ID of the plugin that has the kubelet's snapshotter, and its whole
// section of a dump, or nil if there is no such plugin.
func (c *Instance) criSection(dump map[string]any) (id string, section map[string]any) {
	id = CRIImages
	if !c.HasTransfer() {
		id = CRIV1
	}
	return id, Plugin(dump, id)
}

// lazySettings are the settings of the kubelet's images.
func lazySettings() map[string]any {
	return map[string]any{"snapshotter": LazySnapshotter, "disable_snapshot_annotations": false}
}

// LazyProxy returns the proxy plugin for pilot's snapshotter. Images are pulled into it
// only if the mode is LazyOn.
func LazyProxy(mode LazyMode) map[string]any {
	exports := map[string]any{"root": LazyRoot}
	if mode == LazyOn {
		exports[annotationsExport] = "true"
	}
	return map[string]any{"type": "snapshot", "address": LazySocket, "exports": exports}
}

// LazyCRI returns the plugin whose section makes the kubelet's images use pilot's
// snapshotter, and that section; nil if containerd has no such plugin. containerd 1.7
// takes the section of one file only, so there it has all settings of containerd's
// files, which may be secret.
func (c *Instance) LazyCRI() (id string, section map[string]any, secret bool) {
	id, had := c.criSection(c.Plain)
	switch {
	case had == nil:
		return id, nil, false
	case c.HasTransfer():
		return id, lazySettings(), false
	}
	section = maps.Clone(had)
	inner, _ := had["containerd"].(map[string]any)
	inner = maps.Clone(inner)
	if inner == nil {
		inner = map[string]any{}
	}
	maps.Copy(inner, lazySettings())
	section["containerd"] = inner
	return id, section, true
}

// NotLazy returns what keeps a configuration from pulling lazily, or "".
func (c *Instance) NotLazy(dump map[string]any, platform ocispec.Platform) (string, error) {
	proxies, _ := dump["proxy_plugins"].(map[string]any)
	proxy, _ := proxies[LazySnapshotter].(map[string]any)
	exports, _ := proxy["exports"].(map[string]any)
	address, _ := proxy["address"].(string)
	id, section := c.criSection(dump)
	_, had := c.criSection(c.Plain)
	if !c.HasTransfer() {
		section, _ = section["containerd"].(map[string]any)
	}
	switch {
	case proxy["type"] != "snapshot" || SocketPath(address) != LazySocket:
		return fmt.Sprintf("there is no proxy plugin %s of type snapshot at %s", LazySnapshotter, LazySocket), nil
	case had != nil && section["snapshotter"] != LazySnapshotter:
		return fmt.Sprintf("the snapshotter of %s is %v, not %s", id, section["snapshotter"], LazySnapshotter), nil
	case had != nil && section["disable_snapshot_annotations"] != false:
		return fmt.Sprintf("disable_snapshot_annotations of %s is not false, so the snapshotter does not know which layers to mount", id), nil
	case !c.HasTransfer():
		return "", nil
	case exports[annotationsExport] != "true":
		return fmt.Sprintf("the proxy plugin %s does not export %s = \"true\"", LazySnapshotter, annotationsExport), nil
	}
	differ, err := c.UnpacksWith(dump, platform, LazySnapshotter)
	if err == nil && differ != "pilot" {
		return fmt.Sprintf("the transfer service does not unpack for %s and %s with pilot", platforms.Format(platform), LazySnapshotter), nil
	}
	return "", err
}

// setForLazy reports whether pilot's drop-in sets the setting at path for lazy pulling.
func setForLazy(path []string) bool {
	if within(path, "proxy_plugins", LazySnapshotter) {
		return true
	}
	for name := range lazySettings() {
		if within(path, "plugins", CRIImages, name) || within(path, "plugins", CRIV1, "containerd", name) {
			return true
		}
	}
	return false
}
