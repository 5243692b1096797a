package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"slices"
	"strings"

	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/imgcrypt/v2"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

var (
	restartContainerd = []string{"systemctl restart containerd.service"}
	install           = append([]string{"pilot node install"}, restartContainerd...)
)

// containerdConfig compares what containerd has loaded, what it would load now,
// and what decryption takes.
func (e *examination) containerdConfig(ctx context.Context) Step {
	unread := e.running.load(ctx, Options{ContainerdBinary: e.ContainerdBinary})
	switch {
	case unread == nil:
	case ctx.Err() != nil:
		return failed(fmt.Sprintf("containerd does not read %s in time: %s", e.ContainerdConfig, unread), e.ContainerdBinary+" --config "+e.ContainerdConfig+" config dump")
	case errors.Is(unread, exec.ErrNotFound) || errors.Is(unread, fs.ErrNotExist):
		// That says nothing about the containerd that runs.
		unread = fmt.Errorf("%s is not compared: %w: name containerd's program with --containerd-binary", e.ContainerdConfig, unread)
	default:
		return failed(fmt.Sprintf("containerd can't read %s, and would not start again: %s", e.ContainerdConfig, unread), "correct "+e.ContainerdConfig)
	}
	loaded, broken, err := e.loaded(ctx)
	if err != nil {
		return failed("containerd does not tell its plugins: "+said(err), "journalctl -u containerd.service -n 30")
	}
	at := socketOf(loaded.GetExports()["address"])
	e.builtIn = loaded != nil && at == ""
	if !e.withDiffer() {
		if loaded != nil {
			return failed(fmt.Sprintf("containerd asks pilot's differ at %s, and diff-listen is off", at), e.correctListen()...)
		}
		return e.streamProcessors(unread)
	}

	notLoaded := ""
	switch {
	case broken != "":
		notLoaded = broken
	case loaded == nil:
		notLoaded = "containerd has not loaded pilot's differ"
	case !e.builtIn && at != e.DiffSocket:
		notLoaded = fmt.Sprintf("containerd looks for pilot's differ at %s, and diff-listen is %s", at, e.DiffSocket)
		if at == e.proxy().at {
			return failed(notLoaded, e.correctListen()...)
		}
	}
	var wrong []string
	if unread == nil {
		wrong = e.differOnDisk()
	}
	onDisk := e.ContainerdConfig + ": " + strings.Join(wrong, "; ")
	switch {
	case notLoaded == "" && unread != nil:
		return inOrder(fmt.Sprintf("pilot's differ is loaded (%s)", unread))
	case notLoaded == "" && len(wrong) == 0:
		return inOrder(fmt.Sprintf("pilot's differ is loaded, and %s unpacks into %s with it", e.ContainerdConfig, e.snapshotter()))
	case notLoaded == "" && !e.builtIn && !e.proxy().found:
		return failed(onDisk+", though containerd has loaded it: if it was started with another file, name that with --containerd-config", install...)
	case notLoaded == "":
		return failed(onDisk, install...)
	case unread != nil:
		return failed(fmt.Sprintf("%s (%s)", notLoaded, unread), install...)
	case len(wrong) == 0:
		return failed(fmt.Sprintf("%s, and %s is right: containerd was not restarted since it was written", notLoaded, e.ContainerdConfig), restartContainerd...)
	}
	return failed(notLoaded+"; "+onDisk, install...)
}

// correctListen are the commands that mend a diff-listen that is not where
// containerd looks for pilot.
func (e *examination) correctListen() []string {
	return []string{"correct diff-listen in " + e.Configuration, restartPilot[0]}
}

// withDiffer reports whether containerd has to decrypt with pilot's differ, and
// not with stream processors.
func (e *examination) withDiffer() bool {
	return e.running.usesDiffer() && (e.DiffSocket != "" || e.builtIn)
}

// loaded returns pilot's differ among the plugins of the running containerd, or
// nil, and says which of those that unpack could not be loaded.
func (e *examination) loaded(ctx context.Context) (differ *introspection.Plugin, broken string, err error) {
	list, err := e.client.IntrospectionService().Plugins(ctx)
	if err != nil {
		return nil, "", err
	}
	for _, p := range list.Plugins {
		name := p.Type + "." + p.ID
		switch name {
		case string(plugins.DiffPlugin) + ".pilot":
			differ = p
		case diffService, transferService:
		default:
			continue
		}
		if p.InitErr != nil {
			broken = fmt.Sprintf("containerd could not load its plugin %s: %s", name, p.InitErr.Message)
		}
	}
	return differ, broken, nil
}

// proxy is the proxy plugin pilot of containerd's configuration.
type proxy struct {
	found    bool
	kind, at string
}

func (e *examination) proxy() proxy {
	all, _ := e.running.dump["proxy_plugins"].(map[string]any)
	section, found := all["pilot"].(map[string]any)
	kind, _ := section["type"].(string)
	at, _ := section["address"].(string)
	return proxy{found, kind, socketOf(at)}
}

// differOnDisk says what pilot's differ lacks in containerd's configuration.
func (e *examination) differOnDisk() (wrong []string) {
	switch p := e.proxy(); {
	case e.builtIn:
	case !p.found:
		wrong = append(wrong, "there is no proxy plugin pilot")
	case p.kind != "diff" && p.kind != string(plugins.DiffPlugin):
		wrong = append(wrong, fmt.Sprintf("the proxy plugin pilot is of type %s, not diff", p.kind))
	case p.at != e.DiffSocket:
		wrong = append(wrong, fmt.Sprintf("the proxy plugin pilot is looked for at %s, and diff-listen is %s", p.at, e.DiffSocket))
	}
	if order := stringsOf(e.running.plugin(diffService)["default"]); len(order) == 0 || order[0] != "pilot" {
		wrong = append(wrong, fmt.Sprintf("the diff service asks the differs %q, and not pilot first", order))
	}
	if !e.running.hasTransfer() {
		return wrong
	}
	entries, err := e.running.unpackConfigs(platforms.DefaultSpec())
	if err != nil {
		return append(wrong, fmt.Sprintf("unpack_config of the transfer service can't be read: %s", err))
	}
	// The first that matches is the one that counts.
	i := slices.IndexFunc(entries, func(u unpackConfig) bool {
		p, err := platforms.Parse(u.Platform)
		return err == nil && u.Snapshotter == e.snapshotter() && platforms.Only(p).Match(platforms.DefaultSpec())
	})
	if i < 0 || entries[i].Differ != "pilot" {
		wrong = append(wrong, fmt.Sprintf("the transfer service does not unpack for %s and %s with pilot", platforms.DefaultString(), e.snapshotter()))
	}
	return wrong
}

// socketOf returns the path of a socket that is written with or without unix://.
func socketOf(address string) string { return strings.TrimPrefix(address, "unix://") }

// streamProcessors looks for the programs that decrypt where pilot's differ
// does not. The running containerd does not tell which it has.
func (e *examination) streamProcessors(unread error) Step {
	if unread != nil {
		return skipped(unread.Error())
	}
	var wrong []string
	for _, mt := range []string{ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd} {
		mt, _ = processor.EncryptedMediaType(mt)
		if problem := e.streamProcessor(mt); problem != "" {
			wrong = append(wrong, problem)
		}
	}
	for _, cri := range []string{criImages, criV1} {
		section := e.running.plugin(cri)
		if decryption, found := section["image_decryption"].(map[string]any); found && decryption["key_model"] != "node" {
			wrong = append(wrong, fmt.Sprintf("key_model of %s is %q, not node: the kubelet's pulls pass nothing to stream processors", cri, decryption["key_model"]))
		}
		if local, found := section["use_local_image_pull"].(bool); found && !local {
			wrong = append(wrong, fmt.Sprintf("use_local_image_pull of %s is false: the kubelet's pulls ask no stream processor", cri))
		}
	}
	if len(wrong) > 0 {
		return failed(e.ContainerdConfig+": "+strings.Join(unique(wrong), "; "), install...)
	}
	return inOrder(e.ContainerdConfig + " has stream processors for tar, tar+gzip and tar+zstd")
}

// streamProcessor says what is wrong with the one for a media type.
func (e *examination) streamProcessor(mediaType string) string {
	processors, _ := e.running.dump["stream_processors"].(map[string]any)
	// CRI passes a layer's descriptor to these two only.
	for _, id := range imgcrypt.PayloadToolIDs {
		section, _ := processors[id].(map[string]any)
		if !slices.Contains(stringsOf(section["accepts"]), mediaType) {
			continue
		}
		path, _ := section["path"].(string)
		if _, err := exec.LookPath(path); err != nil {
			return fmt.Sprintf("the stream processor %s can't be run: %s", id, err)
		}
		return ""
	}
	return fmt.Sprintf("no stream processor that CRI knows accepts %s", mediaType)
}

// snapshotter returns the one to unpack into.
func (e *examination) snapshotter() string {
	if e.Snapshotter != "" {
		return e.Snapshotter
	}
	return e.running.snapshotter()
}
