package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/host"
	"github.com/ctrlplane/pilot/node/install"
	"github.com/ctrlplane/pilot/plugin/snapshotter"
)

// Commands that start pilot's snapshotter, and show why it does not start.
var startSnapshotter = []string{"systemctl start " + install.SnapshotterService, "journalctl -u " + install.SnapshotterService + " -n 30"}

// isLazy reports whether the node is set up to pull lazily.
func (e *examination) isLazy() bool {
	return e.Lazy != "" || e.running != nil && e.running.Lazy != containerd.LazyOff
}

// isLazyStep reports whether a step is only for nodes that pull lazily.
func isLazyStep(name string) bool { return name == StepSnapshotter || name == StepLazy }

// snapshotterStep asks pilot's snapshotter for a snapshot that it does not have.
func (e *examination) snapshotterStep(ctx context.Context) Step {
	if !exists(e.LazySnapshotter) {
		return failed(e.LazySnapshotter+" does not exist: pilot's snapshotter is not running", startSnapshotter...)
	}
	if _, wrong := e.socket(e.LazySnapshotter); wrong != nil {
		return *wrong
	}
	target := "unix://" + e.LazySnapshotter
	conn, err := dial(target)
	if err != nil {
		return failed(err.Error(), startSnapshotter...)
	}
	defer conn.Close()
	_, err = snapshotsapi.NewSnapshotsClient(conn).Stat(ctx, &snapshotsapi.StatSnapshotRequest{Snapshotter: containerd.LazySnapshotter, Key: "pilot-doctor"})
	if status.Code(err) != codes.NotFound {
		if err == nil {
			err = errors.New("it has a snapshot that nobody made")
		}
		return failed(fmt.Sprintf("%s: no snapshotter answers: %s", target, said(err)), startSnapshotter...)
	}
	if names := e.stranded(ctx); len(names) > 0 {
		return Step{Result: Warning, Detail: fmt.Sprintf("%s; containerd does not have the layers of these images, and no container of them starts until they are pulled again: %s", target, strings.Join(names, ", ")), Fix: []string{"pilot node forget-images"}}
	}
	return passed(target)
}

// stranded returns the images from which no container can be started since lazy pulling was
// switched on or off.
func (e *examination) stranded(ctx context.Context) (names []string) {
	change := snapshotter.Change{Snapshotter: containerd.LazySnapshotter, To: e.running.Lazy == containerd.LazyOn}
	list, err := change.Stranded(ctx, e.client)
	if err != nil {
		return nil // other steps examine containerd
	}
	for _, i := range list {
		if !strings.HasPrefix(i.Name, "sha256:") {
			names = append(names, i.Name)
		}
	}
	return names
}

// lazyEnding reports what pilot's snapshotter is still there for.
func (e *examination) lazyEnding(ctx context.Context) Step {
	const off = "lazy pulling is switched off"
	containers, err := snapshotter.Containers(ctx, e.client, containerd.LazySnapshotter)
	switch {
	case err != nil:
		return failed("containerd does not list its containers: " + said(err))
	case len(containers) == 0:
		return Step{Result: Warning, Detail: off + ", and no container has pilot's snapshotter any more", Fix: reinstall}
	}
	return passed(fmt.Sprintf("%s, and pilot's snapshotter stays for these containers: %s", off, strings.Join(containers, ", ")))
}

// lazy pulls a small image lazily, as the kubelet does.
func (e *examination) lazy(ctx context.Context) Step {
	if e.running.Lazy == containerd.LazyEnding {
		return e.lazyEnding(ctx)
	}
	if conflict, ok := errors.AsType[*host.Conflict](e.running.CheckLazy()); ok && e.dump != nil {
		if s := e.running.Snapshotter(); s != "overlayfs" && s != containerd.LazySnapshotter {
			return failed(fmt.Sprintf("%s: the kubelet's images have the snapshotter %s, which pilot's drop-in replaces", e.running.Config, s), "pilot node install --lazy=false --now (or make the snapshotter overlayfs)")
		}
		return failed(conflict.What, conflict.Fix)
	}
	if step, none := e.withoutKEK(); none {
		return step
	}
	if e.Lazy == "" {
		return failed(fmt.Sprintf("lazy-listen is off in %s, so the snapshotter reads nothing from pilot, and images are pulled in full", e.Configuration), reinstall...)
	}
	if _, wrong := e.socket(e.Lazy); wrong != nil {
		return *wrong
	}
	if !isFUSE("/dev/fuse") {
		return failed("/dev/fuse is not the kernel's FUSE: the snapshotter can mount nothing, and images are pulled in full", "modprobe fuse")
	}
	if e.dump != nil {
		missing, err := e.running.NotLazy(e.dump, platforms.DefaultSpec())
		if err != nil {
			missing = err.Error()
		}
		if missing != "" {
			return failed(e.running.Config+": "+missing+": images are pulled in full", reinstall...)
		}
	}
	if step, wrong := e.lazyLoaded(ctx); wrong {
		return step
	}
	var why string
	err := e.inScratch(ctx, func(ctx context.Context) (err error) {
		why, err = e.pullLazily(ctx)
		return err
	})
	switch {
	case err != nil:
		return failed(err.Error(), "journalctl -u "+install.SnapshotterService+" -u pilot.service -n 30")
	case why != "":
		return failed("a sealed image was pulled in full: "+why, "journalctl -u "+install.SnapshotterService+" -u pilot.service -n 30")
	}
	return e.reachesRegistries(passed(fmt.Sprintf("an image encrypted for KEK %q was mounted by %s without being pulled, and read", e.kek, containerd.LazySnapshotter)))
}

// reachesRegistries makes a passed step a warning if containerd's files say how to reach
// registries, and pilot, which reads layers from those, does not read them. In a directory of
// pilot's own they may be other files.
func (e *examination) reachesRegistries(step Step) Step {
	if e.dump == nil {
		return step
	}
	dirs := e.running.HostsDirs(e.dump)
	if own := e.Mirror.HostsDir; own != "" && !slices.Contains(dirs, own) {
		return step
	}
	for _, dir := range dirs {
		if dir == e.Mirror.HostsDir {
			continue
		}
		files, _ := containerd.RegistryFiles(host.Host{}, dir) // without those that nobody can read
		for _, registry := range containerd.RegistriesIn(host.Host{}, dir) {
			if hosts := files[filepath.Join(registry, "hosts.toml")]; e.Mirror.is(hosts.Server) || slices.ContainsFunc(slices.Collect(maps.Keys(hosts.Hosts)), e.Mirror.is) {
				continue
			}
			step.Result = Warning
			step.Detail += fmt.Sprintf("; but containerd reaches registries as %s says, and pilot does not: it pulls images of those in full, after it has waited for each layer", registry)
			step.Fix = append([]string{fmt.Sprintf("set mirror-hosts-dir in %s to %s, or to a copy of it without what leads to pilot's mirror", e.Configuration, dir)}, restartPilot...)
			return step
		}
	}
	return step
}

// isFUSE reports whether a file is the device by which file systems are mounted.
func isFUSE(path string) bool {
	var stat unix.Stat_t
	return unix.Stat(path, &stat) == nil && stat.Mode&unix.S_IFMT == unix.S_IFCHR && stat.Rdev == unix.Mkdev(10, 229)
}

// lazyLoaded returns the failed step if the running containerd has not loaded pilot's
// snapshotter as its files say.
func (e *examination) lazyLoaded(ctx context.Context) (Step, bool) {
	loaded, err := e.loaded(ctx)
	if err != nil {
		return failed("containerd does not list its plugins: " + said(err)), true
	}
	for _, p := range loaded.all {
		if p.Type != string(plugins.SnapshotPlugin) || p.ID != containerd.LazySnapshotter {
			continue
		}
		if p.InitErr != nil {
			return failed(fmt.Sprintf("containerd could not load %s: %s", containerd.LazySnapshotter, p.InitErr.Message), e.restartContainerd()), true
		}
		return Step{}, false
	}
	return failed("containerd has not loaded "+containerd.LazySnapshotter+note(e.olderThan()), e.restartContainerd()), true
}

// refused asks the pilot that listens on a unix socket for the first bytes of a layer, as
// its snapshotter does, and returns why it does not serve them, or "". query has more
// parameters of the request.
func refused(ctx context.Context, socket, registry, repository string, layer digest.Digest, query url.Values) (string, error) {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}}
	all := url.Values{"ns": {registry}}
	maps.Copy(all, query)
	at := url.URL{Scheme: "http", Host: "pilot", Path: "/lazy/v2/" + repository + "/blobs/" + layer.String(), RawQuery: all.Encode()}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
	if err != nil {
		return "", err
	}
	req.Header.Set("Range", "bytes=0-1")
	resp, err := client.Do(req)
	if err != nil {
		return "", fmt.Errorf("pilot does not answer at %s: %w", socket, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusPartialContent {
		return "", nil
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return "", err
	}
	var doc struct {
		Errors []struct{ Message string }
	}
	if json.Unmarshal(b, &doc) == nil && len(doc.Errors) > 0 && doc.Errors[0].Message != "" {
		return doc.Errors[0].Message, nil
	}
	return resp.Status, nil
}
