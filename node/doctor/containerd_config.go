package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/imgcrypt/v2"
	"github.com/containerd/platforms"
	"github.com/containerd/plugin"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/host"
	"github.com/ctrlplane/pilot/node/install"
	"github.com/ctrlplane/pilot/processor"
)

var reinstall = []string{"pilot node install --now"}

// restartContainerd is the command that makes containerd read its configuration.
func (e *examination) restartContainerd() string {
	return "systemctl restart " + e.running.Service
}

// machine is this one.
var machine host.Host

// look finds the files and the program of the running containerd. A [host.Conflict] is a
// fault of the node; any other error says why they can't be examined.
func (e *examination) look(ctx context.Context) error {
	n := containerd.Named{Address: e.Containerd, Config: e.ContainerdConfig}
	ours, lost, err := install.Recorded(install.Options{Containerd: n})
	if e.lost = lost; err != nil {
		return err
	}
	// The running process decides. A program that the user has named is only used to
	// read the configuration.
	t, err := containerd.Find(machine, n)
	var conflict *host.Conflict
	if e.ContainerdBinary != "" && !errors.As(err, &conflict) {
		if err != nil {
			n.Binary = e.ContainerdBinary
			t, err = containerd.Find(machine, n)
		} else if t.Program = machine.LookPathIn(e.ContainerdBinary, machine.SearchPath()); t.Program == "" {
			err = fmt.Errorf("%s: %w", e.ContainerdBinary, exec.ErrNotFound)
		}
	}
	if err != nil {
		return err
	}
	e.running.Target = *t
	c, err := containerd.Examine(ctx, machine, *t, ours)
	if err != nil {
		return err
	}
	if c.Major != e.running.Major || c.Minor != e.running.Minor {
		return &host.Conflict{Where: t.Program, What: fmt.Sprintf("it is containerd %d.%d, and %d.%d runs at %s", c.Major, c.Minor, e.running.Major, e.running.Minor, e.Containerd), Fix: e.restartContainerd()}
	}
	if err := c.CheckAddress(n); err != nil {
		return err
	}
	e.running = c
	e.dump, err = c.Dump(ctx, machine)
	c.Workloads = e.Workloads != "" || containerd.RequiresPilot(e.dump)
	if c.Lazy = containerd.LazyIn(e.dump); c.Lazy != containerd.LazyOff {
		// Without a record somebody has set it up by hand, for all containers.
		c.Lazy = containerd.LazyOn
		if is, err := install.Installed(install.Options{Containerd: n}); err == nil && is.Lazy != containerd.LazyOff {
			c.Lazy = is.Lazy
		}
	}
	return err
}

// containerdConfig compares what containerd has loaded, what it would load now, and what
// decryption needs.
func (e *examination) containerdConfig(ctx context.Context) Step {
	unread := e.look(ctx)
	file := e.running.Config
	var conflict *host.Conflict
	switch {
	case unread == nil:
	case errors.As(unread, &conflict):
		return failed(conflict.Where+": "+conflict.What, conflict.Fix)
	case ctx.Err() != nil:
		return failed(fmt.Sprintf("containerd does not read %s in time: %s", file, unread), e.running.Program+" --config "+file+" config dump")
	case errors.Is(unread, exec.ErrNotFound) || errors.Is(unread, fs.ErrNotExist) || e.running.Program == "":
		// The running containerd may still be fine.
		unread = fmt.Errorf("%s is not compared: %w: name containerd's program with --containerd-binary", file, unread)
	default:
		return failed(fmt.Sprintf("containerd can't read %s, and would not start again: %s", file, unread), "correct "+file)
	}
	loaded, err := e.loaded(ctx)
	if err != nil {
		return failed("containerd does not list its plugins: "+said(err), "journalctl -u "+e.running.Service+" -n 30")
	}
	at := containerd.SocketPath(loaded.differ.GetExports()["address"])
	e.builtIn = loaded.differ != nil && at == ""
	var wrong []string
	if unread == nil {
		wrong = append(e.uninstalled(), e.addedToTheRest()...)
	}
	if !e.withDiffer() {
		if loaded.differ != nil {
			return failed(fmt.Sprintf("containerd asks pilot's differ at %s, and diff-listen is off", at), e.correctListen()...)
		}
		return e.streamProcessors(unread, wrong)
	}

	notLoaded := ""
	switch {
	case loaded.broken != "":
		notLoaded = loaded.broken
	case loaded.differ == nil:
		notLoaded = "containerd has not loaded pilot's differ"
	case !e.builtIn && at != e.DiffSocket:
		notLoaded = fmt.Sprintf("containerd looks for pilot's differ at %s, and diff-listen is %s", at, e.DiffSocket)
		if p, _ := containerd.PilotProxy(e.dump); at == p.At {
			return failed(notLoaded, e.correctListen()...)
		}
	}
	if unread == nil {
		wrong = append(wrong, e.differOnDisk()...)
		wrong = append(wrong, e.lists(loaded)...)
	}
	onDisk := file + ": " + strings.Join(wrong, "; ")
	older := e.olderThan()
	switch {
	case notLoaded == "" && unread != nil:
		return passed(fmt.Sprintf("pilot's differ is loaded (%s)", unread))
	case notLoaded == "" && len(wrong) == 0:
		return passed(fmt.Sprintf("pilot's differ is loaded, and %s unpacks into %s with it%s", file, e.snapshotter(), note(older)))
	case notLoaded == "":
		return failed(onDisk, reinstall...)
	case unread != nil:
		return failed(fmt.Sprintf("%s (%s)", notLoaded, unread), reinstall...)
	case len(wrong) == 0 && older != "":
		return failed(fmt.Sprintf("%s, though %s is correct: %s", notLoaded, file, older), e.restartContainerd())
	case len(wrong) == 0:
		return failed(fmt.Sprintf("%s, though %s is correct", notLoaded, file), e.restartContainerd(), "journalctl -u "+e.running.Service+" -n 30")
	}
	return failed(notLoaded+"; "+onDisk, reinstall...)
}

// uninstalled reports that the record of the installation, or a file for systemd, was lost.
func (e *examination) uninstalled() (wrong []string) {
	if e.lost != "" {
		wrong = append(wrong, fmt.Sprintf("%s: %s, and without it \"pilot node refresh\" does nothing", install.RecordFile, e.lost))
	}
	if gone := install.MissingUnits(install.Options{}); len(gone) > 0 {
		wrong = append(wrong, strings.Join(gone, ", ")+": gone since pilot was installed, so systemd does not start pilot with the machine, or run \"pilot node refresh\" before containerd")
	}
	return wrong
}

// addedToTheRest reports other settings of containerd that pilot's drop-in changes.
func (e *examination) addedToTheRest() []string {
	changed := containerd.Differences(e.running.Plain, e.dump, e.running.SetByPilot())
	if len(changed) == 0 {
		return nil
	}
	return []string{"with pilot's drop-in containerd has lost or changed other settings: " + containerd.Summary(changed)}
}

// lists reports entries of other tools that the lists in pilot's drop-in hide, and
// entries of tools that are gone.
func (e *examination) lists(loaded plugged) (wrong []string) {
	if e.builtIn {
		return nil
	}
	order := differs(e.dump)
	for _, name := range order {
		if !loaded.has(plugins.DiffPlugin, name) && !e.configured(name) {
			wrong = append(wrong, fmt.Sprintf("the diff service has the differ %s, which does not exist: after a restart containerd could not pull images", name))
		}
	}
	for _, name := range differs(e.running.Plain) {
		if !slices.Contains(order, name) {
			wrong = append(wrong, fmt.Sprintf("pilot's drop-in hides the differ %s", name))
		}
	}
	if !e.running.HasTransfer() {
		return wrong
	}
	is, err := e.running.UnpackConfigs(e.dump, platforms.DefaultSpec())
	if err != nil {
		return wrong // differOnDisk reports it
	}
	for _, u := range is {
		if u.Optional {
			continue
		}
		if !loaded.has(plugins.SnapshotPlugin, u.Snapshotter) && !e.configured(u.Snapshotter) {
			wrong = append(wrong, fmt.Sprintf("unpack_config has an entry for snapshotter %s, which does not exist: after a restart containerd could not pull images", u.Snapshotter))
		}
		if u.Differ != "" && !loaded.has(plugins.DiffPlugin, u.Differ) && !e.configured(u.Differ) {
			wrong = append(wrong, fmt.Sprintf("unpack_config has an entry with differ %s, which does not exist: after a restart containerd could not pull images", u.Differ))
		}
	}
	should, err := e.running.UnpackConfigsWithPilot(machine)
	if err != nil {
		return append(wrong, err.Error())
	}
	for _, u := range should {
		if !slices.ContainsFunc(is, func(v containerd.UnpackConfig) bool {
			return u.Snapshotter == v.Snapshotter && u.Platform == v.Platform
		}) {
			wrong = append(wrong, fmt.Sprintf("pilot's drop-in hides the entry of unpack_config for snapshotter %s and %s", u.Snapshotter, u.Platform))
		}
	}
	return wrong
}

// differs returns the differs of the diff service in a dump.
func differs(dump map[string]any) []string {
	return containerd.Strings(containerd.Plugin(dump, containerd.DiffService)["default"])
}

// configured reports whether containerd's configuration has a proxy plugin of that
// name.
func (e *examination) configured(name string) bool {
	all, _ := e.dump["proxy_plugins"].(map[string]any)
	return all[name] != nil
}

// olderThan returns the configuration files that were written after containerd was
// started, as text.
func (e *examination) olderThan() string {
	started, err := e.started()
	if err != nil {
		return ""
	}
	files, _, err := (&containerd.ConfigFiles{Main: e.running.Config}).All(machine)
	if err != nil {
		return ""
	}
	var newer []string
	for _, file := range files {
		if info, err := os.Stat(file); err == nil && info.ModTime().After(started.Add(host.StartPrecision)) {
			newer = append(newer, fmt.Sprintf("%s was written at %s", file, info.ModTime().Format(time.DateTime)))
		}
	}
	if len(newer) == 0 {
		return ""
	}
	return fmt.Sprintf("containerd has been running since %s: %s", started.Format(time.DateTime), strings.Join(newer, ", "))
}

// started returns the start time of the running containerd, whatever its program's name.
func (e *examination) started() (time.Time, error) {
	if p := e.running.Process; p != nil {
		return p.Started, nil
	}
	pid, err := host.ListenerPID(e.Containerd)
	if err != nil {
		return time.Time{}, err
	}
	return host.StartedAt(fmt.Sprintf("/proc/%d", pid))
}

// note returns a text in parentheses, to append to a line.
func note(text string) string {
	if text == "" {
		return ""
	}
	return " (" + text + ")"
}

// correctListen returns the fix for a diff-listen that is not the address in
// containerd's configuration.
func (e *examination) correctListen() []string {
	return []string{"correct diff-listen in " + e.Configuration, restartPilot[0]}
}

// withDiffer reports whether containerd should decrypt with pilot's differ, and not with
// stream processors.
func (e *examination) withDiffer() bool {
	return e.running.UsesDiffer() && (e.DiffSocket != "" || e.builtIn)
}

// plugged are the plugins of the running containerd.
type plugged struct {
	all    []*introspection.Plugin
	differ *introspection.Plugin // pilot's, or nil
	broken string                // which plugin for unpacking could not be loaded
}

func (e *examination) loaded(ctx context.Context) (plugged, error) {
	list, err := e.client.IntrospectionService().Plugins(ctx)
	if err != nil {
		return plugged{}, err
	}
	found := plugged{all: list.Plugins}
	for _, p := range list.Plugins {
		name := p.Type + "." + p.ID
		switch name {
		case string(plugins.DiffPlugin) + ".pilot":
			found.differ = p
		case containerd.DiffService, containerd.TransferService:
		default:
			continue
		}
		if p.InitErr != nil {
			found.broken = fmt.Sprintf("containerd could not load its plugin %s: %s", name, p.InitErr.Message)
		}
	}
	return found, nil
}

// has reports whether containerd has a plugin, even if it could not be loaded: the
// reason may be gone when containerd is restarted.
func (p plugged) has(kind plugin.Type, id string) bool {
	return slices.ContainsFunc(p.all, func(p *introspection.Plugin) bool { return p.Type == string(kind) && p.ID == id })
}

// differOnDisk reports what is missing for pilot's differ in containerd's configuration.
func (e *examination) differOnDisk() (wrong []string) {
	switch p, found := containerd.PilotProxy(e.dump); {
	case e.builtIn:
	case !found:
		wrong = append(wrong, "there is no proxy plugin pilot")
	case p.Kind != "diff" && p.Kind != string(plugins.DiffPlugin):
		wrong = append(wrong, fmt.Sprintf("the proxy plugin pilot is of type %s, not diff", p.Kind))
	case p.At != e.DiffSocket:
		wrong = append(wrong, fmt.Sprintf("the proxy plugin pilot has the address %s, and diff-listen is %s", p.At, e.DiffSocket))
	}
	if order := differs(e.dump); len(order) == 0 || order[0] != "pilot" {
		wrong = append(wrong, fmt.Sprintf("the diff service has the differs %q, and pilot is not the first", order))
	}
	if !e.running.HasTransfer() {
		return wrong
	}
	differ, err := e.running.UnpacksWith(e.dump, platforms.DefaultSpec(), e.snapshotter())
	switch {
	case err != nil:
		wrong = append(wrong, fmt.Sprintf("unpack_config of the transfer service can't be read: %s", err))
	case differ != "pilot":
		wrong = append(wrong, fmt.Sprintf("the transfer service does not unpack for %s and %s with pilot", platforms.DefaultString(), e.snapshotter()))
	}
	return wrong
}

// streamProcessors checks the stream processors in the configuration, which decrypt if
// pilot's differ does not. The running containerd has no API that lists its own.
func (e *examination) streamProcessors(unread error, wrong []string) Step {
	if unread != nil {
		return skipped(unread.Error())
	}
	for _, mt := range []string{ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd} {
		mt, _ = processor.EncryptedMediaType(mt)
		if problem := e.streamProcessor(mt); problem != "" {
			wrong = append(wrong, problem)
		}
	}
	for _, cri := range []string{containerd.CRIImages, containerd.CRIV1} {
		section := containerd.Plugin(e.dump, cri)
		if decryption, found := section["image_decryption"].(map[string]any); found && decryption["key_model"] != "node" {
			wrong = append(wrong, fmt.Sprintf("key_model of %s is %q, not node: the kubelet's pulls pass nothing to stream processors", cri, decryption["key_model"]))
		}
		if local, found := section["use_local_image_pull"].(bool); found && !local {
			wrong = append(wrong, fmt.Sprintf("use_local_image_pull of %s is false: the kubelet's pulls use no stream processor", cri))
		}
	}
	if len(wrong) > 0 {
		return failed(e.running.Config+": "+strings.Join(unique(wrong), "; "), reinstall...)
	}
	return passed(e.running.Config + " has stream processors for tar, tar+gzip and tar+zstd" + note(e.olderThan()))
}

// streamProcessor reports what is wrong with the stream processor for a media type.
func (e *examination) streamProcessor(mediaType string) string {
	processors, _ := e.dump["stream_processors"].(map[string]any)
	// CRI passes the keys to these two only.
	for _, id := range imgcrypt.PayloadToolIDs {
		section, _ := processors[id].(map[string]any)
		if !slices.Contains(containerd.Strings(section["accepts"]), mediaType) {
			continue
		}
		path, _ := section["path"].(string)
		if _, err := exec.LookPath(path); err != nil {
			return fmt.Sprintf("the stream processor %s can't be run: %s", id, err)
		}
		return ""
	}
	return fmt.Sprintf("none of the stream processors that CRI uses accepts %s", mediaType)
}

// snapshotter returns the snapshotter to unpack into.
func (e *examination) snapshotter() string {
	if e.Snapshotter != "" {
		return e.Snapshotter
	}
	if e.dump != nil {
		return containerd.SnapshotterIn(e.dump)
	}
	return e.running.Snapshotter()
}
