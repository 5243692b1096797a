package containerd

import (
	"fmt"
	"path/filepath"
	"slices"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/node/host"
)

// DiffSocket is the socket of pilot's differ.
const DiffSocket = "/run/pilot/diff.sock"

// Decoder is a stream processor's media types.
type Decoder struct {
	Accepts []string
	Returns string
}

const layerType = "application/vnd.oci.image.layer.v1."

// Decoders are the stream processors with which containerd 1.6 decrypts, by ID. The
// kubelet's pulls pass a layer's keys to these two only, so zstd goes with gzip:
// containerd detects a layer's compression by itself.
var Decoders = map[string]Decoder{
	"io.containerd.ocicrypt.decoder.v1.tar": {
		Accepts: []string{layerType + "tar+encrypted"}, Returns: layerType + "tar",
	},
	"io.containerd.ocicrypt.decoder.v1.tar.gzip": {
		Accepts: []string{layerType + "tar+gzip+encrypted", layerType + "tar+zstd+encrypted"}, Returns: layerType + "tar+gzip",
	},
}

// StreamProcessor is a stream processor in a configuration.
type StreamProcessor struct {
	Path      string
	Args, Env []string
}

// ProcessorIn returns a stream processor of a dump; its zero value if there is none.
func ProcessorIn(dump map[string]any, id string) StreamProcessor {
	all, _ := dump["stream_processors"].(map[string]any)
	section, _ := all[id].(map[string]any)
	path, _ := section["path"].(string)
	return StreamProcessor{path, Strings(section["args"]), Strings(section["env"])}
}

// UnpacksWith returns the differ with which the transfer service unpacks for a platform
// and a snapshotter, or "" if it has no entry for them.
func (c *Instance) UnpacksWith(dump map[string]any, platform ocispec.Platform, snapshotter string) (differ string, err error) {
	entries, err := c.UnpackConfigs(dump, platform)
	if err != nil {
		return "", err
	}
	for _, u := range entries {
		// containerd uses the first that matches.
		p, err := platforms.Parse(u.Platform)
		if err == nil && u.Snapshotter == snapshotter && platforms.Only(p).Match(platform) {
			return u.Differ, nil
		}
	}
	return "", nil
}

// Proxy is the proxy plugin named pilot in a configuration.
type Proxy struct {
	Kind string // its type
	At   string // the path of its socket
}

// PilotProxy returns the proxy plugin named pilot of a dump.
func PilotProxy(dump map[string]any) (Proxy, bool) {
	all, _ := dump["proxy_plugins"].(map[string]any)
	section, found := all["pilot"].(map[string]any)
	kind, _ := section["type"].(string)
	at, _ := section["address"].(string)
	return Proxy{kind, SocketPath(at)}, found
}

// UnpackConfigsWithPilot returns the entries of unpack_config with pilot as the differ,
// with one added for the kubelet's images if there is none.
func (c *Instance) UnpackConfigsWithPilot(h host.Host) ([]UnpackConfig, error) {
	platform, err := c.Platform(h)
	if err != nil {
		return nil, err
	}
	entries, err := c.UnpackConfigs(c.Plain, platform)
	if err != nil {
		return nil, err
	}
	found := false
	for i := range entries {
		e := &entries[i]
		ours := e.Snapshotter == c.Snapshotter() && e.Platform == platforms.Format(platform)
		found = found || ours
		switch {
		case e.Differ == "" || e.Differ == "walking" || e.Differ == "erofs" && c.plainErofs():
			e.Differ = "pilot"
		case e.Differ != "pilot" && ours:
			return nil, &host.Conflict{Where: c.Config, What: fmt.Sprintf("the transfer service unpacks the kubelet's images, for snapshotter %s, with the differ %s", e.Snapshotter, e.Differ), Fix: "remove that entry of unpack_config, or make its differ pilot"}
		}
	}
	if !found {
		entries = append(entries, UnpackConfig{Platform: platforms.Format(platform), Snapshotter: c.Snapshotter(), Differ: "pilot"})
	}
	if c.Lazy == LazyOn && !slices.ContainsFunc(entries, func(e UnpackConfig) bool { return e.Snapshotter == LazySnapshotter }) {
		entries = append(entries, UnpackConfig{Platform: platforms.Format(platform), Snapshotter: LazySnapshotter, Differ: "pilot"})
	}
	return entries, nil
}

// SetByPilot returns a function that reports whether pilot's drop-in sets a setting.
func (c *Instance) SetByPilot() func(path []string) bool {
	if !c.UsesDiffer() {
		return setByDecoder
	}
	return func(path []string) bool {
		return setByDiffer(path) || c.Lazy != LazyOff && setForLazy(path) || c.Workloads && setForWorkloads(path)
	}
}

// setByDiffer reports whether pilot's drop-in for its differ sets the setting at path.
func setByDiffer(path []string) bool {
	return within(path, "proxy_plugins", "pilot") ||
		within(path, "plugins", DiffService, "default") ||
		within(path, "plugins", TransferService, "unpack_config")
}

// setByDecoder reports whether pilot's drop-in for stream processors does.
func setByDecoder(path []string) bool {
	for id := range Decoders {
		if within(path, "stream_processors", id) {
			return true
		}
	}
	return false
}

// AddsOnlyPilot reports whether a drop-in's settings add pilot to containerd's
// configuration, and nothing else.
func AddsOnlyPilot(conf map[string]any) bool {
	lazy := LazyIn(conf) != LazyOff
	others := Differences(nil, conf, func(path []string) bool {
		return setByDiffer(path) || setByDecoder(path) || within(path, "plugins", DiffService, "sync_fs") ||
			// See LazyCRI.
			lazy && (setForLazy(path) || within(path, "plugins", CRIV1)) ||
			// See WorkloadsSection.
			within(path, "plugins", NRI)
	})
	return len(others) == 0 && MentionsPilot(conf)
}

// LazyIn returns what a configuration that pilot has written has pilot's snapshotter for.
func LazyIn(conf map[string]any) LazyMode {
	proxies, _ := conf["proxy_plugins"].(map[string]any)
	proxy, found := proxies[LazySnapshotter].(map[string]any)
	exports, _ := proxy["exports"].(map[string]any)
	switch {
	case !found:
		return LazyOff
	case exports[annotationsExport] != "true":
		return LazyEnding
	}
	return LazyOn
}

// LazyExported returns what a containerd that has loaded pilot's snapshotter as pilot has
// configured it, with these exports, has it for.
func LazyExported(exports map[string]string) LazyMode {
	if exports[annotationsExport] == "true" {
		return LazyOn
	}
	return LazyEnding
}

// MentionsPilot reports whether containerd asks pilot with this configuration.
func MentionsPilot(dump map[string]any) bool {
	if p, ok := PilotProxy(dump); ok && p.At == DiffSocket || LazyIn(dump) != LazyOff || SnapshotterIn(dump) == LazySnapshotter || RequiresPilot(dump) {
		return true
	}
	if slices.Contains(Strings(Plugin(dump, DiffService)["default"]), "pilot") {
		return true
	}
	entries, _ := Plugin(dump, TransferService)["unpack_config"].([]any)
	for _, e := range entries {
		if entry, ok := e.(map[string]any); ok && entry["differ"] == "pilot" {
			return true
		}
	}
	for id := range Decoders {
		if filepath.Base(ProcessorIn(dump, id).Path) == "pilot-decoder" {
			return true
		}
	}
	return false
}
