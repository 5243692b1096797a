package node

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	continuity "github.com/containerd/continuity/fs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/pelletier/go-toml/v2"
)

// containerd is the one of the machine: its version and what its configuration
// comes to.
type containerd struct {
	major, minor int
	main         string         // the configuration file, inside the root
	dump         map[string]any // the effective configuration
	imports      []string       // patterns of drop-ins that are read, inside the root
}

// runWithin bounds a run of containerd's binary.
const runWithin = 20 * time.Second

// look finds out about the machine's containerd.
func look(ctx context.Context, o Options) (*containerd, error) {
	c := &containerd{main: o.ContainerdConfig}
	out, err := o.run(ctx, "--version")
	if err != nil {
		return nil, fmt.Errorf("containerd's version: %w", err)
	}
	if c.major, c.minor, err = parseVersion(string(out)); err != nil {
		return nil, err
	}
	if c.major < 1 || c.major == 1 && c.minor < 6 {
		return nil, fmt.Errorf("containerd %d.%d is too old: 1.6 or later is needed", c.major, c.minor)
	}
	if err := c.load(ctx, o); err != nil {
		return nil, err
	}
	return c, nil
}

// load reads the effective configuration.
func (c *containerd) load(ctx context.Context, o Options) error {
	args := []string{"--config", c.main, "config", "dump"}
	text, err := os.ReadFile(o.path(c.main))
	switch {
	case errors.Is(err, os.ErrNotExist):
		args = []string{"config", "default"} // which 1.x takes then
	case err != nil:
		return err
	}
	out, err := o.run(ctx, args...)
	if err != nil {
		return fmt.Errorf("containerd's configuration: %w", err)
	}
	c.dump = nil
	if err := toml.Unmarshal(out, &c.dump); err != nil {
		return fmt.Errorf("containerd %s: its output is not TOML: %w", strings.Join(args, " "), err)
	}
	var main struct {
		Imports []string `toml:"imports"`
	}
	if err := toml.Unmarshal(text, &main); err != nil {
		return fmt.Errorf("%s: %w", c.main, err)
	}
	// The dump shows 2.x's default, which counts only where the file says it.
	c.imports = main.Imports
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

// run runs containerd and returns what it prints.
func (o Options) run(ctx context.Context, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, runWithin)
	defer cancel()
	args = append([]string{o.ContainerdBinary}, args...)
	if o.Root != "" {
		args = append([]string{"chroot", o.Root}, args...)
	}
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	if o.Root == "" {
		cmd.Env = os.Environ()
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		lines := strings.Split(strings.TrimSpace(stderr.String()), "\n")
		return nil, fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, lines[len(lines)-1])
	}
	return out, nil
}

// path returns where a file of the machine is for this process, after all
// symbolic links, which lead to nowhere outside the machine's root.
func (o Options) path(name string) string {
	root := o.Root
	if root == "" {
		root = "/"
	}
	resolved, err := continuity.RootPath(root, name)
	if err != nil {
		return filepath.Join(root, name) // which fails as well
	}
	return resolved
}

// linkPath is path for what may be a symbolic link itself.
func (o Options) linkPath(name string) string {
	return filepath.Join(o.path(filepath.Dir(name)), filepath.Base(name))
}

// usesDiffer reports whether this containerd can have pilot as its differ.
// 1.6 panics on a proxy plugin of that type.
func (c *containerd) usesDiffer() bool { return c.major > 1 || c.minor > 6 }

// hasTransfer reports whether it pulls with its transfer service, which has a
// configuration of its own for unpacking.
func (c *containerd) hasTransfer() bool { return c.major > 1 }

// format is the version of the configuration files that it reads.
func (c *containerd) format() int {
	if c.major > 1 {
		return 3
	}
	return 2
}

// plugin returns the configuration of a plugin.
func (c *containerd) plugin(id string) map[string]any {
	plugins, _ := c.dump["plugins"].(map[string]any)
	p, _ := plugins[id].(map[string]any)
	return p
}

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

// unpackConfigs returns the entries that the transfer service has, or those
// that it takes when there are none.
func (c *containerd) unpackConfigs(platform ocispec.Platform) ([]unpackConfig, error) {
	list, ok := c.plugin(transferService)["unpack_config"]
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

// dropInDir returns a directory from which containerd reads all configuration
// files, inside the root.
func (c *containerd) dropInDir() (string, bool) {
	for _, pattern := range slices.Backward(c.imports) {
		if !filepath.IsAbs(pattern) {
			pattern = filepath.Join(filepath.Dir(c.main), pattern)
		}
		if filepath.Base(pattern) == "*.toml" && !strings.Contains(filepath.Dir(pattern), "*") {
			return filepath.Dir(pattern), true
		}
	}
	return "", false
}

// platform returns that of the machine: of its containerd if it is another
// machine's root.
func (o Options) platform() (ocispec.Platform, error) {
	p := platforms.DefaultSpec()
	if o.Root == "" {
		return p, nil
	}
	candidates := []string{o.ContainerdBinary}
	if !filepath.IsAbs(o.ContainerdBinary) {
		candidates = nil
		for _, dir := range []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"} {
			candidates = append(candidates, filepath.Join(dir, o.ContainerdBinary))
		}
	}
	for _, name := range candidates {
		f, err := elf.Open(o.path(name))
		if err != nil {
			continue
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
	return p, fmt.Errorf("containerd's program is not found in %s: name it with --containerd-binary", o.Root)
}

// address returns the path of containerd's socket.
func (c *containerd) address() string {
	grpc, _ := c.dump["grpc"].(map[string]any)
	address, _ := grpc["address"].(string)
	if address == "" {
		address, _ = c.plugin("io.containerd.server.v1.grpc")["address"].(string)
	}
	if address == "" {
		address = defaultAddress
	}
	return strings.TrimPrefix(address, "unix://")
}

const defaultAddress = "/run/containerd/containerd.sock"

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
