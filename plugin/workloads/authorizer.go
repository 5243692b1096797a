// Package workloads decides which containers may be created on a node: a container of an
// encrypted image needs a broker that lets its workload, NAMESPACE/SERVICEACCOUNT, use the
// image's KEKs. That holds for images that were unpacked long ago, too.
//
// containerd starts a small program, the [Plugin], and asks it by NRI about each container.
// It forwards the request to pilot, in which an [Authorizer] decides. The plugin outlives
// pilot: while pilot is away it still lets containers of plain images run, and no others.
package workloads

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/glob"
	"github.com/ctrlplane/pilot/plugin/imagekeys"
)

// Container is a container that is about to be created.
type Container struct {
	// Namespace, Pod and PodUID identify its pod.
	Namespace string `json:"namespace"`
	Pod       string `json:"pod"`
	PodUID    string `json:"podUID"`
	// Labels are the pod's, which its author has chosen. They are nil if they are not known:
	// earlier plugins don't send them.
	Labels map[string]string `json:"labels"`
	// Name is the container's name in its pod, and ID that in containerd.
	Name string `json:"name"`
	ID   string `json:"id"`
	// Image is the one that it runs. containerd before 2.4 says its name alone.
	Image imagekeys.Image `json:"image"`
	// Asked is the image's name in the pod's specification, if it is known.
	Asked string `json:"asked,omitempty"`
	// Volumes are where containerd has mounted the images that are its volumes. The last
	// element of each path is the digest of the image's manifest or index, in hex.
	Volumes []string `json:"volumes,omitempty"`
}

// images returns the images whose files the container has.
func (c Container) images(ctx context.Context, resolver *imagekeys.Resolver) ([]imagekeys.Image, error) {
	own := c.Image
	if own.Digest == "" {
		var err error
		if own, err = resolver.ImageOf(ctx, criNamespace, c.ID, own); err != nil {
			return nil, err
		}
	}
	all := []imagekeys.Image{own}
	for _, mounted := range c.Volumes {
		// containerd looks the image's name up twice, for the path and for what it mounts.
		said := imagekeys.Image{Digest: digest.NewDigestFromEncoded(digest.SHA256, path.Base(mounted))}
		volume, err := resolver.ImageOf(ctx, criNamespace, mounted, said)
		if err != nil {
			return nil, fmt.Errorf("image volume: %w", err)
		}
		all = append(all, volume)
	}
	return all, nil
}

// Settings are those of an [Authorizer] that may change while it runs.
type Settings struct {
	// Broker has the node's KEKs.
	Broker *client.Client
	// TTL is how long a verdict is used without asking the broker again.
	TTL time.Duration
	// Grace is how much longer an earlier permission is used while no broker answers.
	Grace time.Duration
	// NodeKeyWorkloads are patterns of the workloads that may use images that the node
	// decrypts with keys that no broker has. Default: none.
	NodeKeyWorkloads []string
	// SystemWorkloads are patterns of the workloads that may use the plain layers of their
	// images, also if they were decrypted here for others and nothing shows that they are
	// public. So nobody can keep the cluster's own containers from being created.
	SystemWorkloads []string
	// Accounts finds the service accounts of pods.
	Accounts Accounts
}

// Authorizer decides which containers may be created. It is safe for concurrent use.
type Authorizer struct {
	images   *imagekeys.Resolver
	settings func() Settings
	verdicts verdicts
	accounts accountCache
	metrics  *metrics
}

// New returns an Authorizer that finds in images which KEKs an image needs. settings is
// called for each container. registry may be nil.
func New(images *imagekeys.Resolver, settings func() Settings, registry prometheus.Registerer) *Authorizer {
	a := &Authorizer{images: images, settings: settings, metrics: newMetrics(registry)}
	a.verdicts.now = time.Now
	a.verdicts.ask = func(ctx context.Context, u use) ([]string, error) {
		return a.settings().Broker.Use(ctx, u.kek.ID, u.kek.Version, u.workload, u.labels)
	}
	return a
}

// Forget drops all verdicts.
func (a *Authorizer) Forget() { a.verdicts.forget() }

// criNamespace is the namespace of the kubelet's images in containerd.
const criNamespace = "k8s.io"

// Authorize returns nil if the container may be created. The error of one that may not is a
// [Denial]; other errors say why that can't be decided before ctx is done.
func (a *Authorizer) Authorize(ctx context.Context, c Container) (err error) {
	start := time.Now()
	result := resultPlain
	defer func() {
		var denial *Denial
		switch {
		case errors.As(err, &denial):
			result = resultDenied
		case err != nil:
			result = resultUnavailable
		}
		a.metrics.observe(result, time.Since(start))
		if err != nil {
			logrus.WithError(err).WithFields(logrus.Fields{"namespace": c.Namespace, "pod": c.Pod, "container": c.Name}).Warn("container not created")
		}
	}()
	images, err := c.images(ctx, a.images)
	if err != nil {
		return err
	}
	for i, image := range images {
		layers, err := a.images.Needs(ctx, criNamespace, image)
		if err != nil {
			return err
		}
		if err := a.checkEncrypted(ctx, c, image, i == 0); err != nil {
			return err
		}
		if len(layers) == 0 {
			continue
		}
		result = resultAllowed
		if err := a.allowed(ctx, c, image, layers); err != nil {
			return err
		}
	}
	return nil
}

// checkEncrypted returns an error if the setting must-be-encrypted does not let an image of
// a container run. own is false for images that it mounts.
func (a *Authorizer) checkEncrypted(ctx context.Context, c Container, image imagekeys.Image, own bool) error {
	err := checkEncrypted(ctx, a.images, c, image, own)
	if errdefs.IsFailedPrecondition(err) {
		return &Denial{Namespace: c.Namespace, Image: nameOf(image), err: err, rule: true}
	}
	return err
}

func checkEncrypted(ctx context.Context, images *imagekeys.Resolver, c Container, image imagekeys.Image, own bool) error {
	var names []string
	if own && c.Asked != "" {
		names = append(names, c.Asked)
	}
	return images.CheckEncrypted(ctx, criNamespace, image, names...)
}

func nameOf(image imagekeys.Image) string {
	if image.Name == "" {
		return image.Digest.String()
	}
	return image.Name
}

// allowed returns nil if the workload of a container may use all layers of an image.
func (a *Authorizer) allowed(ctx context.Context, c Container, image imagekeys.Image, layers []imagekeys.Layer) error {
	settings := a.settings()
	account, unknown, err := a.accounts.of(settings.Accounts, c.Namespace, c.PodUID)
	if err != nil {
		return fmt.Errorf("service account of pod %s/%s: %w", c.Namespace, c.Pod, err)
	}
	who := use{workload: c.Namespace + "/" + account, labels: c.Labels}
	done := map[string]bool{} // layers of an image mostly have the same KEKs
	for _, layer := range layers {
		key := fmt.Sprint(layer.KEKs, layer.Other, layer.Unproven)
		if done[key] {
			continue
		}
		if err := a.layerAllowed(ctx, settings, who, layer); err != nil {
			var denial *Denial
			if errors.As(err, &denial) {
				denial.Namespace, denial.Account, denial.Unknown = c.Namespace, account, unknown
				denial.Image, denial.Layer, denial.NoLabels = nameOf(image), layer, c.Labels == nil
			}
			return err
		}
		done[key] = true
	}
	return nil
}

// layerAllowed returns nil if a workload may use one of the KEKs of a layer.
func (a *Authorizer) layerAllowed(ctx context.Context, s Settings, who use, layer imagekeys.Layer) error {
	if layer.Other && matchesAny(s.NodeKeyWorkloads, who.workload) || layer.Unproven && matchesAny(s.SystemWorkloads, who.workload) {
		return nil
	}
	for _, who.kek = range layer.KEKs {
		if a.verdicts.knownAllowed(who, s.TTL) {
			return nil
		}
	}
	var why error
	denied := map[string]bool{} // KEKs in every version
	asked := 0
	newest := slices.SortedStableFunc(slices.Values(layer.KEKs), func(a, b imagekeys.KEK) int { return b.Version - a.Version })
	for _, kek := range newest {
		who.kek = kek
		if denied[kek.ID] {
			continue
		}
		if asked++; asked > maxAsked {
			break
		}
		err := a.verdicts.allowed(ctx, who, s.TTL, s.Grace)
		if err == nil {
			return nil
		}
		denied[kek.ID] = !isOutage(err) && !errors.Is(err, client.ErrNoVersion)
		// That a broker does not answer counts more than that another KEK is denied.
		if why == nil || isOutage(err) {
			why = err
		}
	}
	if isOutage(why) {
		return why
	}
	return &Denial{err: why}
}

func matchesAny(patterns []string, workload string) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool { return glob.MatchPath(pattern, workload) })
}

// maxAsked is how many KEKs of a layer the broker is asked for, so that an image that names
// thousands does not flood it.
const maxAsked = 32

// isOutage reports whether err says nothing about what a workload may do.
func isOutage(err error) bool {
	return errors.Is(err, client.ErrUnavailable) || errors.Is(err, errNoAnswerYet)
}

// Denial is the error of a container that may not be created.
type Denial struct {
	Namespace, Account string
	// Unknown says why the service account is not known; empty: it is.
	Unknown string
	// NoLabels reports that the pod's labels are not known.
	NoLabels bool
	Image    string
	Layer    imagekeys.Layer
	err      error // the broker's answer; nil: it was not asked
	rule     bool  // err is of the setting must-be-encrypted
}

func (d *Denial) Error() string {
	if d.rule {
		return fmt.Sprintf("namespace %q may not use image %s: %s", d.Namespace, d.Image, d.err)
	}
	var keks []string
	for _, kek := range d.Layer.KEKs {
		keks = append(keks, fmt.Sprintf("%q", kek.ID))
	}
	var b strings.Builder
	fmt.Fprintf(&b, "namespace %q", d.Namespace)
	if d.Account != "" {
		fmt.Fprintf(&b, " with service account %q", d.Account)
	}
	if len(keks) == 0 {
		fmt.Fprintf(&b, " may not use image %s, which the node decrypts with a key of its own: add %q to node-key-workloads in pilot.toml", d.Image, d.Namespace+"/*")
	} else {
		fmt.Fprintf(&b, " may not use KEK %s of image %s: allow it by a rule with workloads = [%q] in copilot's policy", strings.Join(keks, " or "), d.Image, d.Namespace+"/*")
	}
	if d.Layer.Why != "" {
		fmt.Fprintf(&b, " (layer %s: %s)", d.Layer.DiffID, d.Layer.Why)
	}
	if d.Account == "" && d.Unknown != "" {
		fmt.Fprintf(&b, "; rules that name a service account do not match: %s", d.Unknown)
	}
	if d.NoLabels && len(keks) > 0 {
		fmt.Fprintf(&b, "; rules with labels do not match: the pod has more than %d KiB of them, or containerd still runs the plugin of an earlier pilot, until it is restarted", maxLabels>>10)
	}
	if d.err != nil {
		fmt.Fprintf(&b, ": %s", d.err)
	}
	return b.String()
}

func (d *Denial) Unwrap() error { return d.err }
