package containerd

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"

	"github.com/pelletier/go-toml/v2"

	"github.com/ctrlplane/pilot/node/host"
)

// pilot's NRI plugin, which containerd starts and asks about each container.
const (
	NRI = "io.containerd.nri.v1.nri"
	// PluginFile is the name of its program, and RequiredPlugin its own.
	PluginFile     = "00-" + RequiredPlugin
	RequiredPlugin = "pilot"

	// DefaultPlugin is its path if containerd's plugin_path is the default.
	DefaultPlugin = "/opt/nri/plugins/" + PluginFile
)

// PluginPath returns the path of pilot's NRI plugin: containerd starts all programs in that
// directory.
func (c *Instance) PluginPath() string {
	dir, _ := c.plugin(NRI)["plugin_path"].(string)
	if dir == "" {
		return DefaultPlugin
	}
	return filepath.Join(dir, PluginFile)
}

// Plugins returns the paths that pilot's NRI plugin may have by the plugin_path of these
// files, those that can't be read left out.
func (f *ConfigFiles) Plugins(h host.Host) (paths []string) {
	files, _, _ := f.All(h)
	for _, file := range files {
		var conf map[string]any
		if text, err := ReadConfig(h, file); err != nil || toml.Unmarshal(text, &conf) != nil {
			continue
		}
		for _, id := range []string{NRI, "nri"} { // the second in a file without a version
			if dir, _ := Plugin(conf, id)["plugin_path"].(string); filepath.IsAbs(dir) {
				paths = append(paths, filepath.Join(dir, PluginFile))
			}
		}
	}
	return paths
}

// RequiresPlugins reports whether this containerd can be made to create no container without
// pilot's NRI plugin.
func (c *Instance) RequiresPlugins() bool { return c.Major > 2 || c.Major == 2 && c.Minor >= 2 }

// CheckWorkloads returns a [host.Conflict] if pilot's NRI plugin can't be added.
func (c *Instance) CheckWorkloads(h host.Host) error {
	if !c.UsesDiffer() {
		return &host.Conflict{Where: c.Program, What: fmt.Sprintf("containerd %d.%d asks no plugin about containers", c.Major, c.Minor), Fix: "upgrade containerd to 1.7 or later, or leave out --workloads"}
	}
	nri := c.plugin(NRI)
	if disabled, _ := nri["disable"].(bool); disabled {
		// Turning NRI on would start them.
		entries, err := h.ReadDir(filepath.Dir(c.PluginPath()))
		if host.IgnoreNotExist(err) != nil {
			return err
		}
		for _, e := range entries {
			if e.Name() != PluginFile {
				return &host.Conflict{Where: filepath.Dir(c.PluginPath()), What: fmt.Sprintf("NRI is off in %s, and %s would start with pilot's plugin", c.Config, e.Name()), Fix: "move it away, or turn NRI on"}
			}
		}
	}
	return c.tolerates(nri)
}

// tolerates returns a [host.Conflict] if pods can say that they need no plugin.
func (c *Instance) tolerates(nri map[string]any) error {
	validator, _ := nri["default_validator"].(map[string]any)
	if annotation, _ := validator["tolerate_missing_plugins_annotation"].(string); annotation != "" {
		return &host.Conflict{Where: c.Config, What: fmt.Sprintf("tolerate_missing_plugins_annotation lets any pod with the annotation %s start without pilot's plugin", annotation), Fix: "remove that setting"}
	}
	return nil
}

// WorkloadsSection returns the settings of NRI that make containerd ask pilot's plugin, or
// nil if it does without.
func (c *Instance) WorkloadsSection() map[string]any {
	had, section := c.plugin(NRI), map[string]any{}
	if disabled, _ := had["disable"].(bool); disabled {
		if !c.HasTransfer() {
			// containerd 1.7 takes the section of one file only.
			section = maps.Clone(had)
		}
		section["disable"] = false
	}
	if c.RequiresPlugins() {
		validator, _ := had["default_validator"].(map[string]any)
		required := Strings(validator["required_plugins"])
		if !slices.Contains(required, RequiredPlugin) {
			required = append(required, RequiredPlugin)
		}
		section["default_validator"] = map[string]any{"enable": true, "required_plugins": required}
	}
	if len(section) == 0 {
		return nil
	}
	return section
}

// NotAsking returns what keeps a configuration from making containerd ask pilot's plugin
// about each container, or "".
func (c *Instance) NotAsking(dump map[string]any) string {
	nri := Plugin(dump, NRI)
	if disabled, _ := nri["disable"].(bool); disabled || nri == nil {
		return "NRI is off, so containers of encrypted images are created for every workload"
	}
	if dir, _ := nri["plugin_path"].(string); dir != "" && filepath.Join(dir, PluginFile) != c.PluginPath() {
		return fmt.Sprintf("plugin_path is %s, and pilot's plugin is in %s", dir, filepath.Dir(c.PluginPath()))
	}
	if !c.RequiresPlugins() {
		return ""
	}
	validator, _ := nri["default_validator"].(map[string]any)
	if enabled, _ := validator["enable"].(bool); !enabled || !slices.Contains(Strings(validator["required_plugins"]), RequiredPlugin) {
		return fmt.Sprintf("%s is not among the required_plugins of NRI's default_validator, so containers are created if it has ended", RequiredPlugin)
	}
	if err := c.tolerates(nri); err != nil {
		return err.Error()
	}
	return ""
}

// setForWorkloads reports whether pilot's drop-in sets the setting at path for its NRI
// plugin.
func setForWorkloads(path []string) bool {
	return within(path, "plugins", NRI, "disable") ||
		within(path, "plugins", NRI, "default_validator", "enable") ||
		within(path, "plugins", NRI, "default_validator", "required_plugins")
}

// RequiresPilot reports whether a configuration makes containerd start pilot's NRI plugin.
func RequiresPilot(conf map[string]any) bool {
	nri := Plugin(conf, NRI)
	validator, _ := nri["default_validator"].(map[string]any)
	return slices.Contains(Strings(validator["required_plugins"]), RequiredPlugin)
}
