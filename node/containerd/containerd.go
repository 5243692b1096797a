// Package containerd finds a machine's containerd and works out its effective
// configuration: the files that it reads, what they come to, and what of it is
// pilot's. It changes nothing: package install does.
package containerd

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/pelletier/go-toml/v2"

	"github.com/ctrlplane/pilot/node/host"
)

// Instance is the machine's containerd with its version and its configuration.
type Instance struct {
	Target
	Major, Minor, Patch int // Patch may be -1: unknown
	Files               ConfigFiles
	Ours                []string       // pilot's drop-ins, which may be gone
	Plain               map[string]any // the effective configuration without them
	Lazy                LazyMode       // what pilot's drop-in is to have pilot's snapshotter for
	Workloads           bool           // and to make containerd ask pilot's NRI plugin
}

// CheckAddress returns a [host.Conflict] if the user has named a socket, nothing
// listens there, and this containerd is configured with another.
func (c *Instance) CheckAddress(n Named) error {
	if at := c.Socket(); c.Process == nil && n.Address != "" && !SameSocket(at, n.Address) {
		return &host.Conflict{Where: c.Config, What: fmt.Sprintf("it makes containerd listen at %s, and the containerd that listens at %s is unknown", at, n.Address),
			Fix: "start that one as root, or name its file with --containerd-config"}
	}
	return nil
}

// Examine runs a containerd's program for its version and its configuration. ours are
// pilot's drop-ins.
func Examine(ctx context.Context, h host.Host, t Target, ours []string) (*Instance, error) {
	c := &Instance{Target: t}
	out, err := c.run(ctx, h, "--version")
	if err != nil {
		return nil, fmt.Errorf("containerd's version: %w", err)
	}
	if c.Major, c.Minor, c.Patch, err = ParseVersion(string(out)); err != nil {
		return nil, err
	}
	if err := c.CheckVersion(); err != nil {
		return nil, err
	}
	if c.Files, err = ReadConfigFiles(h, c.Config); err != nil {
		return nil, err
	}
	// containerd would block on a named pipe.
	if err := c.checkKinds(h); err != nil {
		return nil, err
	}
	c.Ours = ours
	c.takeOutTemplate(h)
	c.Plain, err = c.Trial(ctx, h, nil)
	return c, err
}

func (c *Instance) CheckVersion() error {
	if c.Major < 1 || c.Major == 1 && c.Minor < 6 {
		return fmt.Errorf("containerd %d.%d is too old: 1.6 or later is needed", c.Major, c.Minor)
	}
	return nil
}

// Dump returns the effective configuration, as containerd prints it. It is an error if
// containerd would not start with it.
func (c *Instance) Dump(ctx context.Context, h host.Host) (map[string]any, error) {
	args := []string{"--config", c.Config, "config", "dump"}
	if !h.Has(c.Config) {
		args = []string{"config", "default"} // which 1.x takes then
	}
	dump, err := c.readDump(ctx, h, args...)
	if err != nil {
		return nil, err
	}
	return dump, c.checkImports(h)
}

// checkKinds returns a [host.Conflict] if containerd would read a configuration file
// that is not a regular file. Other problems of its files containerd reports itself.
func (c *Instance) checkKinds(h host.Host) error {
	_, _, err := (&ConfigFiles{Main: c.Config}).All(h)
	var conflict *host.Conflict
	if errors.As(err, &conflict) {
		return conflict
	}
	return nil
}

// checkImports checks that the files exist that are imported by name.
func (c *Instance) checkImports(h host.Host) error {
	files := ConfigFiles{Main: c.Config}
	_, missing, err := files.All(h)
	if err != nil {
		return err
	}
	if len(missing) > 0 {
		return fmt.Errorf("containerd does not start with %s: it imports %s, which does not exist", c.Config, strings.Join(missing, ", "))
	}
	return nil
}

var versionNumber = regexp.MustCompile(`\bv?(\d+)\.(\d+)\.(\d*)`)

// ParseVersion returns the numbers of the first version in a text. patch is -1 if it has none.
func ParseVersion(text string) (major, minor, patch int, err error) {
	// containerd github.com/containerd/containerd/v2 v2.4.2 0123abcd
	m := versionNumber.FindStringSubmatch(text)
	if m == nil {
		return 0, 0, 0, fmt.Errorf("no version of containerd in %.100q", text)
	}
	major, _ = strconv.Atoi(m[1])
	minor, _ = strconv.Atoi(m[2])
	if patch, err = strconv.Atoi(m[3]); err != nil {
		patch = -1
	}
	return major, minor, patch, nil
}

// run runs containerd's program and returns its standard output.
func (c *Instance) run(ctx context.Context, h host.Host, args ...string) ([]byte, error) {
	return h.Run(ctx, c.Program, args...)
}

// UsesDiffer reports whether this containerd supports differs as proxy plugins. 1.6
// panics on one.
func (c *Instance) UsesDiffer() bool { return c.Major > 1 || c.Minor > 6 }

// HasTransfer reports whether this containerd pulls with the transfer service, which has
// its own configuration for unpacking.
func (c *Instance) HasTransfer() bool { return c.Major > 1 }

// Format is how a configuration file names plugins.
type Format struct {
	Version int  // 0: the file has none
	Short   bool // plugins are named without their types
}

// Formats returns the formats of a drop-in to try, the best first.
//
// A file without a version goes with all others: containerd 2.0 and later migrate it by
// itself, and 1.x takes the version of the other files. containerd 2.0 to 2.2 merge
// files with a version before migrating them, by the version of the last, so a drop-in
// with a version unlike the others' loses their settings; 1.x refuses to mix versions.
func (c *Instance) Formats() []Format {
	list := []Format{{}, {Short: true}}
	if v := c.Files.Version; v > 1 {
		list = append(list, Format{Version: v})
	}
	for _, v := range []int{3, 2} {
		if f := (Format{Version: v}); v <= c.NewestFormat() && !slices.Contains(list, f) {
			list = append(list, f)
		}
	}
	return list
}

// NewestFormat returns the newest version of configuration files that this containerd
// and pilot support.
func (c *Instance) NewestFormat() int {
	if c.Major > 1 {
		return 3
	}
	return 2
}

// Plugin returns a plugin's section of a dump.
func Plugin(dump map[string]any, id string) map[string]any {
	plugins, _ := dump["plugins"].(map[string]any)
	p, _ := plugins[id].(map[string]any)
	return p
}

// plugin returns a plugin's section of the configuration without pilot's drop-in.
func (c *Instance) plugin(id string) map[string]any { return Plugin(c.Plain, id) }

// Plugins whose configuration matters for unpacking.
const (
	DiffService     = "io.containerd.service.v1.diff-service"
	TransferService = "io.containerd.transfer.v1.local"
	CRIImages       = "io.containerd.cri.v1.images"
	CRIV1           = "io.containerd.grpc.v1.cri"
)

// Snapshotter returns the snapshotter of the kubelet's images without pilot's drop-in.
func (c *Instance) Snapshotter() string { return SnapshotterIn(c.Plain) }

// SnapshotterIn returns the snapshotter of the kubelet's images in a dump.
func SnapshotterIn(dump map[string]any) string {
	s, _ := Plugin(dump, CRIImages)["snapshotter"].(string)
	if s == "" {
		v1, _ := Plugin(dump, CRIV1)["containerd"].(map[string]any)
		s, _ = v1["snapshotter"].(string)
	}
	if s == "" {
		s = "overlayfs"
	}
	return s
}

// UnpackConfig is an entry of the transfer service's unpack_config.
type UnpackConfig struct {
	Platform    string   `toml:"platform"`
	Snapshotter string   `toml:"snapshotter"`
	Differ      string   `toml:"differ"`
	ConfigType  string   `toml:"config_type,omitempty"`
	LayerTypes  []string `toml:"layer_types,omitempty"`
	Optional    bool     `toml:"optional,omitempty"`
}

// UnpackConfigs returns the transfer service's entries of unpack_config in a dump, or its
// defaults if there are none.
func (c *Instance) UnpackConfigs(dump map[string]any, platform ocispec.Platform) ([]UnpackConfig, error) {
	list, ok := Plugin(dump, TransferService)["unpack_config"]
	if !ok {
		entries := []UnpackConfig{{Platform: platforms.Format(platform), Snapshotter: "overlayfs", Differ: "walking"}}
		if c.Major > 2 || c.Minor >= 3 {
			platform.OSFeatures = []string{"erofs"}
			entries = append(entries, UnpackConfig{Platform: platforms.FormatAll(platform), Snapshotter: "erofs", Differ: "erofs", Optional: true})
		}
		return entries, nil
	}
	var entries struct {
		List []UnpackConfig `toml:"list"`
	}
	b, err := toml.Marshal(map[string]any{"list": list})
	if err != nil {
		return nil, err
	}
	err = toml.Unmarshal(b, &entries)
	return entries.List, err
}

// plainErofs reports whether containerd's erofs differ has no options, as the one in
// pilot.
func (c *Instance) plainErofs() bool {
	for _, v := range c.plugin("io.containerd.differ.v1.erofs") {
		switch v := v.(type) {
		case bool:
			if v {
				return false
			}
		case []any:
			if len(v) > 0 {
				return false
			}
		}
	}
	return true
}

// Platform returns the machine's platform: that of containerd's program if the machine is
// a root directory.
func (c *Instance) Platform(h host.Host) (ocispec.Platform, error) {
	p := platforms.DefaultSpec()
	if h.Root == "" {
		return p, nil
	}
	f, err := elf.Open(h.Path(c.Program))
	if err != nil {
		return p, fmt.Errorf("containerd's program in %s: %w", h.Root, err)
	}
	defer f.Close()
	arch, ok := map[elf.Machine]string{
		elf.EM_X86_64: "amd64", elf.EM_AARCH64: "arm64", elf.EM_RISCV: "riscv64", elf.EM_S390: "s390x", elf.EM_PPC64: "ppc64le",
	}[f.Machine]
	if !ok {
		return p, fmt.Errorf("containerd in %s is for an unknown architecture: %s", h.Root, f.Machine)
	}
	return platforms.Normalize(ocispec.Platform{OS: "linux", Architecture: arch}), nil
}

// Socket returns the path of its socket.
func (c *Instance) Socket() string {
	if c.Address != "" {
		return c.Address
	}
	grpc, _ := c.Plain["grpc"].(map[string]any)
	address, _ := grpc["address"].(string)
	if address == "" {
		address, _ = c.plugin("io.containerd.server.v1.grpc")["address"].(string)
	}
	if address == "" {
		address = DefaultAddress
	}
	return SocketPath(address)
}

// Strings returns the strings of a list in a dump.
func Strings(v any) []string {
	var list []string
	items, _ := v.([]any)
	for _, item := range items {
		if s, ok := item.(string); ok {
			list = append(list, s)
		}
	}
	return list
}

// SocketPath returns an address without unix://.
func SocketPath(address string) string { return strings.TrimPrefix(address, "unix://") }

// Deferred reports whether drop-ins are read only after the distribution that containerd
// belongs to has started it.
func (c *Instance) Deferred() bool {
	_, isImported := c.Files.DropInDir()
	return c.Rewritten && !isImported
}

// SameSocket reports whether two paths are the same socket: /var/run is a link to /run.
func SameSocket(a, b string) bool { return withoutVar(a) == withoutVar(b) }

func withoutVar(path string) string {
	if rest, ok := strings.CutPrefix(path, "/var/run/"); ok {
		return "/run/" + rest
	}
	return path
}
