package node

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
)

// containerd is the one of the machine: its version and what its configuration
// comes to.
type containerd struct {
	target
	major, minor int
	files        configFiles
	ours         []string       // pilot's drop-ins that are there, or were
	plain        map[string]any // the effective configuration without pilot's drop-in
}

// look finds out about the machine's containerd.
func look(ctx context.Context, o Options, before state) (*containerd, error) {
	t, err := findTarget(o)
	if err != nil {
		return nil, err
	}
	c, err := lookAt(ctx, o, *t, before)
	if err != nil {
		return nil, err
	}
	return c, c.checkAddress(o)
}

// checkAddress refuses a containerd that does not run, if another was named by its
// socket.
func (c *containerd) checkAddress(o Options) error {
	if at := c.socket(); c.process == nil && o.ContainerdAddress != "" && withoutVar(at) != withoutVar(o.ContainerdAddress) {
		return &Conflict{c.config, fmt.Sprintf("it has a containerd listen at %s, and which one listens at %s is not known", at, o.ContainerdAddress),
			"start that one as root, or name its file with --containerd-config"}
	}
	return nil
}

// lookAt finds out about a containerd.
func lookAt(ctx context.Context, o Options, t target, before state) (*containerd, error) {
	c := &containerd{target: t}
	out, err := c.run(ctx, o, "--version")
	if err != nil {
		return nil, fmt.Errorf("containerd's version: %w", err)
	}
	if c.major, c.minor, err = parseVersion(string(out)); err != nil {
		return nil, err
	}
	if err := c.checkVersion(); err != nil {
		return nil, err
	}
	if c.files, err = readConfigFiles(o, c.config); err != nil {
		return nil, err
	}
	// containerd would wait for a named pipe.
	if err := c.checkKinds(o); err != nil {
		return nil, err
	}
	c.ours = before.dropIns()
	c.plain, err = c.trial(ctx, o, nil)
	return c, err
}

func (c *containerd) checkVersion() error {
	if c.major < 1 || c.major == 1 && c.minor < 6 {
		return fmt.Errorf("containerd %d.%d is too old: 1.6 or later is needed", c.major, c.minor)
	}
	return nil
}

// readAll returns what the configuration comes to as it is.
func (c *containerd) readAll(ctx context.Context, o Options) (map[string]any, error) {
	args := []string{"--config", c.config, "config", "dump"}
	if !o.has(c.config) {
		args = []string{"config", "default"} // which 1.x takes then
	}
	dump, err := c.readDump(ctx, o, args...)
	if err != nil {
		return nil, err
	}
	return dump, c.checkImports(o)
}

// checkKinds refuses what containerd would read as a file that is none. What else
// is wrong with its files, containerd says.
func (c *containerd) checkKinds(o Options) error {
	_, _, err := (&configFiles{main: c.config}).all(o)
	var conflict *Conflict
	if errors.As(err, &conflict) {
		return conflict
	}
	return nil
}

// checkImports checks that the files are there that are imported by name.
func (c *containerd) checkImports(o Options) error {
	files := configFiles{main: c.config}
	_, missing, err := files.all(o)
	if err != nil {
		return err
	}
	if len(missing) > 0 {
		return fmt.Errorf("containerd does not start with %s: it imports %s, which does not exist", c.config, strings.Join(missing, ", "))
	}
	return nil
}

var versionNumber = regexp.MustCompile(`\bv?(\d+)\.(\d+)\.`)

func parseVersion(text string) (major, minor int, err error) {
	// containerd github.com/containerd/containerd/v2 v2.4.2 0123abcd
	m := versionNumber.FindStringSubmatch(text)
	if m == nil {
		return 0, 0, fmt.Errorf("containerd's version can't be told from %.100q", text)
	}
	major, _ = strconv.Atoi(m[1])
	minor, _ = strconv.Atoi(m[2])
	return major, minor, nil
}

// run runs containerd's program and returns what it prints.
func (c *containerd) run(ctx context.Context, o Options, args ...string) ([]byte, error) {
	return o.runProgram(ctx, c.program, args...)
}

// usesDiffer reports whether this containerd can have pilot as its differ.
// 1.6 panics on a proxy plugin of that type.
func (c *containerd) usesDiffer() bool { return c.major > 1 || c.minor > 6 }

// hasTransfer reports whether it pulls with its transfer service, which has a
// configuration of its own for unpacking.
func (c *containerd) hasTransfer() bool { return c.major > 1 }

// formats are the formats of a drop-in to try, the best first.
//
// One without a version suits all other files: containerd 2.0 and later migrates
// it by itself, and 1.x takes the version from the other files. containerd 2.0 to
// 2.2 merges files that say a version before it migrates them, by the version of
// the last, so one of another version than the rest has it forget the rest; 1.x
// refuses to mix them.
func (c *containerd) formats() []format {
	list := []format{{}, {short: true}}
	if v := c.files.version; v > 1 {
		list = append(list, format{version: v})
	}
	for _, v := range []int{3, 2} {
		if f := (format{version: v}); v <= c.newestFormat() && !slices.Contains(list, f) {
			list = append(list, f)
		}
	}
	return list
}

// newestFormat is the newest version of configuration files that it and pilot
// know.
func (c *containerd) newestFormat() int {
	if c.major > 1 {
		return 3
	}
	return 2
}

// pluginIn returns the configuration of a plugin in a dump.
func pluginIn(dump map[string]any, id string) map[string]any {
	plugins, _ := dump["plugins"].(map[string]any)
	p, _ := plugins[id].(map[string]any)
	return p
}

// plugin returns the configuration of a plugin, without pilot's drop-in.
func (c *containerd) plugin(id string) map[string]any { return pluginIn(c.plain, id) }

const (
	diffService     = "io.containerd.service.v1.diff-service"
	transferService = "io.containerd.transfer.v1.local"
	criImages       = "io.containerd.cri.v1.images"
	criV1           = "io.containerd.grpc.v1.cri"
)

// snapshotter returns the one that the kubelet's images are unpacked with.
func (c *containerd) snapshotter() string {
	s, _ := c.plugin(criImages)["snapshotter"].(string)
	if s == "" {
		v1, _ := c.plugin(criV1)["containerd"].(map[string]any)
		s, _ = v1["snapshotter"].(string)
	}
	if s == "" {
		s = "overlayfs"
	}
	return s
}

// unpackConfig is an entry of the transfer service's unpack_config.
type unpackConfig struct {
	Platform    string   `toml:"platform"`
	Snapshotter string   `toml:"snapshotter"`
	Differ      string   `toml:"differ"`
	ConfigType  string   `toml:"config_type,omitempty"`
	LayerTypes  []string `toml:"layer_types,omitempty"`
	Optional    bool     `toml:"optional,omitempty"`
}

// unpackConfigs returns the entries that the transfer service has in a dump, or
// those that it takes when there are none.
func (c *containerd) unpackConfigs(dump map[string]any, platform ocispec.Platform) ([]unpackConfig, error) {
	list, ok := pluginIn(dump, transferService)["unpack_config"]
	if !ok {
		entries := []unpackConfig{{Platform: platforms.Format(platform), Snapshotter: "overlayfs", Differ: "walking"}}
		if c.major > 2 || c.minor >= 3 {
			platform.OSFeatures = []string{"erofs"}
			entries = append(entries, unpackConfig{Platform: platforms.FormatAll(platform), Snapshotter: "erofs", Differ: "erofs", Optional: true})
		}
		return entries, nil
	}
	var entries struct {
		List []unpackConfig `toml:"list"`
	}
	b, err := toml.Marshal(map[string]any{"list": list})
	if err != nil {
		return nil, err
	}
	err = toml.Unmarshal(b, &entries)
	return entries.List, err
}

// plainErofs reports whether containerd's erofs differ works as that in pilot
// does: with no options.
func (c *containerd) plainErofs() bool {
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

// platform returns that of the machine: of its containerd if it is another
// machine's root.
func (c *containerd) platform(o Options) (ocispec.Platform, error) {
	p := platforms.DefaultSpec()
	if o.Root == "" {
		return p, nil
	}
	f, err := elf.Open(o.path(c.program))
	if err != nil {
		return p, fmt.Errorf("containerd's program in %s: %w", o.Root, err)
	}
	defer f.Close()
	arch, ok := map[elf.Machine]string{
		elf.EM_X86_64: "amd64", elf.EM_AARCH64: "arm64", elf.EM_RISCV: "riscv64", elf.EM_S390: "s390x", elf.EM_PPC64: "ppc64le",
	}[f.Machine]
	if !ok {
		return p, fmt.Errorf("containerd in %s is for a machine that is not known here: %s", o.Root, f.Machine)
	}
	return platforms.Normalize(ocispec.Platform{OS: "linux", Architecture: arch}), nil
}

// socket returns the path of the socket that it answers on.
func (c *containerd) socket() string {
	if c.address != "" {
		return c.address
	}
	grpc, _ := c.plain["grpc"].(map[string]any)
	address, _ := grpc["address"].(string)
	if address == "" {
		address, _ = c.plugin("io.containerd.server.v1.grpc")["address"].(string)
	}
	if address == "" {
		address = defaultAddress
	}
	return socketOf(address)
}

func stringsOf(v any) []string {
	var list []string
	items, _ := v.([]any)
	for _, item := range items {
		if s, ok := item.(string); ok {
			list = append(list, s)
		}
	}
	return list
}
