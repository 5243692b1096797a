package workloads

import (
	"context"
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"github.com/opencontainers/go-digest"
	"github.com/sirupsen/logrus"
	"golang.org/x/mod/semver"

	"github.com/ctrlplane/pilot/plugin/imagekeys"
)

const (
	// PluginName is the plugin's name in containerd's required_plugins.
	PluginName = "pilot"
	// PluginFile is the name of the plugin's program in containerd's plugin_path. Its
	// number puts it before the plugins of others, so that they prepare nothing for a
	// container that is not created.
	PluginFile = "00-" + PluginName
)

// Plugin is the NRI plugin that containerd starts. It asks pilot, and decides by itself
// while pilot gives no answer.
type Plugin struct {
	// Open returns the path at which pilot serves [NewServer], and what is asked while
	// pilot gives no answer. config is what containerd has for the plugin in a file. After an
	// error it is called again for the next container.
	Open func(config string) (socket string, offline *Offline, err error)

	stub   stub.Stub
	config string                    // from containerd
	silent atomic.Pointer[time.Time] // when pilot has not answered in time, unless it has since

	mu      sync.Mutex // guards those below until they are set
	pilot   *remote
	offline *Offline
}

// Run serves containerd, which has started this process as a plugin, until it closes the
// connection or ctx is done.
func (p *Plugin) Run(ctx context.Context) error {
	var err error
	if p.stub, err = stub.New(p); err != nil {
		return err
	}
	return p.stub.Run(ctx)
}

// containerdVersion matches a version of containerd, such as 2.2.9+unknown.
var containerdVersion = regexp.MustCompile(`^v?(\d+)\.(\d+)\.`)

// hasValidators reports whether a containerd asks validators after all plugins have changed
// the container, and does not create it if one gives no answer. They came with NRI 0.10, in
// containerd 2.2. nri may be a guess of the library's, or "unknown".
func hasValidators(version, nri string) bool {
	m := containerdVersion.FindStringSubmatch(version)
	if m == nil {
		return semver.IsValid(nri) && semver.Compare(nri, "v0.10.0") >= 0
	}
	major, _ := strconv.Atoi(m[1])
	minor, _ := strconv.Atoi(m[2])
	return major > 2 || major == 2 && minor >= 2
}

// Configure takes the plugin's settings, and returns which events containerd shall ask it
// about. Without usable settings no container is created: an error here would end the plugin,
// and older versions of containerd do without it.
func (p *Plugin) Configure(_ context.Context, config, _, version string) (stub.EventMask, error) {
	p.config = config
	_ = p.open() // authorize returns the error
	var events stub.EventMask
	if hasValidators(version, p.stub.RuntimeNRIVersion()) {
		events.Set(api.Event_VALIDATE_CONTAINER_ADJUSTMENT)
	} else {
		events.Set(api.Event_CREATE_CONTAINER)
	}
	return events, nil
}

// open calls Open unless that has succeeded before.
func (p *Plugin) open() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pilot != nil {
		return nil
	}
	socket, offline, err := p.Open(p.config)
	if err != nil {
		return err
	}
	p.pilot, p.offline = newRemote(socket), offline
	return nil
}

// CreateContainer is called by versions of containerd without validators. They create the
// container if the plugin ends meanwhile, or takes longer than their time limit, and so does
// NRI's required_plugins for the first container after that.
func (p *Plugin) CreateContainer(ctx context.Context, pod *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	return nil, nil, p.authorize(ctx, pod, c)
}

// ValidateContainerAdjustment is called by the others.
func (p *Plugin) ValidateContainerAdjustment(ctx context.Context, r *api.ValidateContainerAdjustmentRequest) error {
	return p.authorize(ctx, r.GetPod(), r.GetContainer())
}

// margin is how much earlier than containerd's time limit the plugin answers.
const margin = 300 * time.Millisecond

func (p *Plugin) authorize(ctx context.Context, pod *api.PodSandbox, c *api.Container) (err error) {
	defer func() {
		// Without the plugin, older versions of containerd create everything.
		if r := recover(); r != nil {
			logrus.WithField("panic", r).Error("container not created")
			err = fmt.Errorf("pilot: panic: %v", r)
		}
	}()
	if err := p.open(); err != nil {
		return fmt.Errorf("pilot: no container is created until pilot's plugin can read its settings: %w", err)
	}
	limit := p.stub.RequestTimeout()
	if limit <= 0 {
		limit = stub.DefaultRequestTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, max(limit-margin, limit/2))
	defer cancel()
	container := containerOf(pod, c)
	// What is left of the time is for the plugin's own decision.
	patience := limit / 2
	if silent := p.silent.Load(); silent != nil && time.Since(*silent) < outageTTL {
		patience = outageWait // others wait
	}
	asking, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err = p.pilot.authorize(asking, container)
	if errors.Is(err, errAway) {
		if now := time.Now(); asking.Err() != nil {
			p.silent.Store(&now)
		}
		err = p.offline.authorize(ctx, container, err)
	} else {
		p.silent.Store(nil)
	}
	if err != nil {
		return fmt.Errorf("pilot: %w", err)
	}
	return nil
}

// imageName is the annotation with the image's name: in containerd 2.1 and later, what the
// pod's specification has.
const imageName = "io.kubernetes.cri.image-name"

func containerOf(pod *api.PodSandbox, c *api.Container) Container {
	image := imagekeys.Image{Name: c.GetImage().GetName(), Digest: digest.Digest(c.GetImage().GetDigest())}
	asked := c.GetAnnotations()[imageName]
	if image.Digest == "" {
		image.Name = asked
	}
	var volumes []string
	for _, m := range c.GetMounts() {
		if v, ok := imageVolume(m.GetSource(), pod.GetId()); ok && !slices.Contains(volumes, v) {
			volumes = append(volumes, v)
		}
	}
	return Container{Namespace: pod.GetNamespace(), Pod: pod.GetName(), PodUID: pod.GetUid(), Labels: labelsOf(pod), Name: c.GetName(), ID: c.GetId(), Image: image, Asked: asked, Volumes: volumes}
}

// maxLabels bounds the labels of a pod, in bytes.
const maxLabels = 32 << 10

// labelsOf returns a pod's labels, or nil if there are too many.
func labelsOf(pod *api.PodSandbox) map[string]string {
	labels, size := map[string]string{}, 0
	for key, value := range pod.GetLabels() {
		labels[key] = value
		size += len(key) + len(value)
	}
	if size > maxLabels {
		return nil
	}
	return labels
}

// imageVolume returns where containerd has mounted the image of which a mount's source is a
// volume: that is at …/image-volumes/SANDBOX/HEX, and a path below that may follow.
func imageVolume(source, sandbox string) (mounted string, ok bool) {
	parent, rest, ok := strings.Cut(path.Clean(source), "/image-volumes/"+sandbox+"/")
	if !ok || sandbox == "" {
		return "", false
	}
	hex, _, _ := strings.Cut(rest, "/")
	return path.Join(parent, "image-volumes", sandbox, hex), true
}
