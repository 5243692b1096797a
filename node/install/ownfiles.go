package install

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/pelletier/go-toml/v2"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/host"
)

// own plans a file of pilot. An existing file that pilot did not write is kept if keep
// accepts it; a nil keep accepts none.
func (p *Plan) own(before record, path string, text []byte, keep func([]byte) error) error {
	return p.ownMode(before, path, text, 0o644, keep)
}

func (p *Plan) ownMode(before record, path string, text []byte, mode fs.FileMode, keep func([]byte) error) error {
	old, err := p.options.readInstalled(path)
	if errors.Is(err, fs.ErrNotExist) {
		p.Changes = append(p.Changes, Change{Path: path, New: text, Mode: mode})
		return nil
	}
	if err != nil {
		return err
	}
	if string(old) == string(text) {
		return nil
	}
	if f := before.file(path); f == nil || !f.is(old) {
		if keep != nil {
			return keep(old)
		}
		return &host.Conflict{Where: path, What: "it exists, and pilot did not write it", Fix: "move it away"}
	}
	p.Changes = append(p.Changes, Change{Path: path, Old: old, New: text, Mode: mode})
	return nil
}

// hostsDir is the setting of how pilot reaches registries.
const hostsDir = "mirror-hosts-dir"

// imgcryptKeys is the directory of keys in containerd's default configuration.
const imgcryptKeys = "/etc/containerd/ocicrypt/keys"

// pilotConfig plans pilot.toml, with the directory of keys that stream processors used.
func (p *Plan) pilotConfig(c *containerd.Instance, before record, keys string) error {
	settings := maps.Clone(p.options.Settings)
	if settings == nil {
		settings = make(map[string]string)
	}
	if a := c.Socket(); c.UsesDiffer() && a != containerd.DefaultAddress {
		settings["containerd"] = a
	}
	if keys != "" {
		settings["decryption-keys-path"] = keys
	}
	if c.Lazy != containerd.LazyOff {
		settings["lazy-listen"] = "unix://" + LazySocket
	}
	if c.Workloads {
		settings["workloads-listen"] = "unix://" + WorkloadsSocket
	}
	wanted, err := p.options.withInstalled(settings)
	if err != nil {
		return err
	}
	switch listen := wanted["mirror-listen"]; {
	case listen != "" && listen != "off":
		// containerd may be led to the mirror, which must not go by the same files.
	case c.Lazy == containerd.LazyOn && wanted[hostsDir] == "":
		wanted[hostsDir] = c.HostsDir(p.options.Host)
	case c.Lazy == containerd.LazyOff && (before.Lazy || before.LazyEnding) && settings[hostsDir] == "" && slices.Contains(c.HostsDirs(c.Plain), wanted[hostsDir]):
		delete(wanted, hostsDir)
	}
	ends := map[string]string{} // settings to remove, with the reason
	if had := containerd.SocketPath(wanted["containerd"]); c.UsesDiffer() && settings["containerd"] == "" && had != "" && !containerd.SameSocket(had, c.Socket()) && !host.SameFile(had, c.Socket()) {
		ends["containerd"] = "containerd listens at " + c.Socket()
	}
	if c.Lazy == containerd.LazyOff && (before.Lazy || before.LazyEnding) && wanted["lazy-listen"] == "unix://"+LazySocket {
		ends["lazy-listen"] = "lazy pulling is being switched off"
	}
	if !c.Workloads && before.Workloads && wanted["workloads-listen"] == "unix://"+WorkloadsSocket {
		ends["workloads-listen"] = "asking about workloads is being switched off"
	}
	maps.DeleteFunc(wanted, func(name, _ string) bool { return ends[name] != "" })
	check := func(had []byte) error {
		for _, name := range slices.Sorted(maps.Keys(ends)) {
			return &host.Conflict{Where: pilotConfig, What: name + " is set, and " + ends[name], Fix: "remove it there, and run this again"}
		}
		return checkPilotConfig(had, settings, c.UsesDiffer())
	}
	return p.own(before, pilotConfig, newPilotConfig(wanted, c.UsesDiffer()), check)
}

// withInstalled returns settings with those of the existing pilot.toml added, so that
// installing again keeps them.
func (o Options) withInstalled(settings map[string]string) (map[string]string, error) {
	wanted := maps.Clone(settings)
	old, err := o.ReadFile(pilotConfig)
	if err != nil {
		return wanted, host.IgnoreNotExist(err)
	}
	var had map[string]any
	if err := toml.Unmarshal(old, &had); err != nil {
		return nil, fmt.Errorf("%s: %w", pilotConfig, err)
	}
	for name, v := range had {
		if s, ok := v.(string); ok && wanted[name] == "" && name != "diff-listen" {
			wanted[name] = s
		}
	}
	return wanted, nil
}

// checkPilotBinary rejects a program that systemd can't run, or should not run as root.
func (o Options) checkPilotBinary() error {
	name := o.PilotBinary
	if !filepath.IsAbs(name) || strings.ContainsAny(name, " \t\n\"'%$\\") {
		return fmt.Errorf("pilot at %q: the path has to be absolute, without spaces, quotes, %% and $", name)
	}
	if o.Root != "" {
		return nil
	}
	resolved, err := filepath.EvalSymlinks(name)
	if err != nil {
		return err
	}
	for _, path := range []string{name, resolved} {
		for at := path; ; at = filepath.Dir(at) {
			info, err := os.Stat(at)
			if err != nil {
				return err
			}
			if owner := info.Sys().(*syscall.Stat_t); owner.Uid != 0 || info.Mode().Perm()&0o022 != 0 && info.Mode()&fs.ModeSticky == 0 {
				return fmt.Errorf("%[1]s would run as root, and users other than root can change %[2]s: install it first (make install), or take that right from them (chown root %[2]s; chmod go-w %[2]s)", name, at)
			}
			if at == "/" {
				break
			}
		}
	}
	return nil
}

// newPilotConfig returns the text of a pilot.toml with settings. isPilotConfig recognizes
// it by its exact lines.
func newPilotConfig(settings map[string]string, differ bool) []byte {
	var b strings.Builder
	b.WriteString("# pilot's configuration: \"pilot serve --help\" tells all settings and their defaults.\n")
	if settings["broker"] == "" {
		b.WriteString("#broker = \"https://copilot.example.com:8443\"\n#broker-ca = \"/etc/pilot/ca.pem\"\n#broker-cert = \"/etc/pilot/node.pem\"\n#broker-key = \"/etc/pilot/node-key.pem\"\n")
	}
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		if v := settings[name]; v != "" {
			fmt.Fprintf(&b, "%s = %q\n", name, v)
		}
	}
	if !differ {
		b.WriteString("# containerd 1.6 can't use it.\ndiff-listen = \"off\"\n")
	}
	return []byte(b.String())
}

// checkPilotConfig rejects an existing pilot.toml that does not suit the installation.
func checkPilotConfig(had []byte, settings map[string]string, differ bool) error {
	var conf map[string]any
	if err := toml.Unmarshal(had, &conf); err != nil {
		return fmt.Errorf("%s: %w", pilotConfig, err)
	}
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		if v := settings[name]; v != "" && written(conf[name]) != v {
			return &host.Conflict{Where: pilotConfig, What: fmt.Sprintf("%s is %v, not %q", name, shown(conf[name]), v), Fix: "change it there"}
		}
	}
	for name, want := range map[string]string{"listen": "unix://" + keySocket, "diff-listen": "unix://" + containerd.DiffSocket} {
		if v, ok := conf[name]; ok && v != want && (name == "listen" || differ) {
			return &host.Conflict{Where: pilotConfig, What: fmt.Sprintf("%s is %v", name, shown(v)), Fix: "remove it: containerd and the tools look for " + want}
		}
	}
	return nil
}

// written returns a setting as it is written in a flag: a list with commas.
func written(v any) any {
	list, ok := v.([]any)
	if !ok {
		return v
	}
	words := make([]string, len(list))
	for i, word := range list {
		words[i] = fmt.Sprint(word)
	}
	return strings.Join(words, ",")
}

func shown(v any) string {
	if v == nil {
		return "not set"
	}
	return fmt.Sprintf("%q", v)
}

// checkKeyProviders rejects an existing ocicrypt.conf without pilot.
func checkKeyProviders(had []byte) error {
	names, err := providerNames(had)
	switch {
	case err != nil:
		return &host.Conflict{Where: keyProviders, What: "ocicrypt can't read it: " + err.Error(), Fix: "correct it, or move it away"}
	case slices.Contains(names, "pilot"):
		return nil
	}
	return &host.Conflict{Where: keyProviders, What: "it has no key provider pilot", Fix: `add "pilot": {"grpc": "unix://` + keySocket + `"}`}
}

// PackagedPilot is pilot's path in packages and in the units as they are embedded.
const PackagedPilot = "/usr/bin/pilot"

// unitWants are pilot's units, with the directories of the links that enable them.
var unitWants = map[string]string{
	PilotService:               "multi-user.target.wants",
	"pilot-keyprovider.socket": "sockets.target.wants",
	"pilot-diff.socket":        "sockets.target.wants",
	LazySocketUnit:             "sockets.target.wants",
	SnapshotterService:         "multi-user.target.wants",
}

// units plans systemd's units and the links that enable them. Units of a package are
// used as they are.
func (p *Plan) units(before record, differ bool) error {
	names := maps.Clone(unitWants)
	if !differ {
		delete(names, "pilot-diff.socket")
	}
	if p.Lazy() == containerd.LazyOff {
		maps.DeleteFunc(names, func(name, _ string) bool { return isLazyUnit(name) })
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		path := filepath.Join(host.UnitDir, name)
		for _, dir := range []string{"/usr/lib/systemd/system", "/lib/systemd/system"} {
			if p.options.Has(filepath.Join(dir, name)) {
				path = filepath.Join(dir, name)
			}
		}
		if own := filepath.Join(host.UnitDir, name); path != own && before.file(own) != nil {
			return &host.Conflict{Where: own, What: "it is from an earlier installation, and systemd would use it instead of the package's", Fix: "run \"pilot node uninstall --keep-config\", and this again"}
		}
		if strings.HasPrefix(path, host.UnitDir) {
			text, err := unitFiles.ReadFile("units/" + name)
			if err != nil {
				return err
			}
			text = bytes.ReplaceAll(text, []byte(PackagedPilot), []byte(p.options.PilotBinary))
			if err := p.own(before, path, text, nil); err != nil {
				return err
			}
		}
		link := filepath.Join(host.UnitDir, names[name], name)
		if _, err := p.options.Lstat(link); errors.Is(err, fs.ErrNotExist) {
			p.Changes = append(p.Changes, Change{Path: link, Link: path})
		}
	}
	return nil
}

// unitDropIns plans the drop-ins of containerd's unit, and of pilot's for the environment
// that stream processors had.
func (p *Plan) unitDropIns(before record, env []string) error {
	c := p.containerd
	if err := p.own(before, filepath.Join(host.UnitDir, c.Service+".d", refreshName), refreshUnit(p.options.PilotBinary), nil); err != nil {
		return err
	}
	if len(env) == 0 {
		return nil
	}
	return p.own(before, filepath.Join(host.UnitDir, PilotService+".d", decoderUnit), environmentUnit(c.Config, env), nil)
}

// refreshName is the drop-in that makes systemd run "pilot node refresh" before it
// starts containerd.
const refreshName = "pilot.conf"

// decoderUnit is the drop-in of pilot.service with the environment that stream
// processors had.
const decoderUnit = "decoder.conf"

func refreshUnit(pilot string) []byte {
	return fmt.Appendf(nil, writtenBy+`# containerd's configuration may have been rewritten, by a tool or at boot.
[Service]
ExecStartPre=-%s node refresh
`, pilot)
}

// environmentUnit returns the text of decoderUnit.
func environmentUnit(from string, env []string) []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "# Written by \"pilot node install\": what the stream processors of\n# %s had.\n[Service]\n", from)
	quote := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "%", "%%")
	for _, v := range env {
		fmt.Fprintf(&b, "Environment=\"%s\"\n", quote.Replace(v))
	}
	return []byte(b.String())
}
