package workloads

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync"

	containerd "github.com/containerd/containerd/v2/client"

	"github.com/ctrlplane/pilot/internal/layerkeys"
	"github.com/ctrlplane/pilot/internal/mustencrypt"
	"github.com/ctrlplane/pilot/plugin/imagekeys"
)

// Offline decides while pilot gives no answer: containers of plain images are created.
type Offline struct {
	Client *containerd.Client
	// Record is the file of pilot's record of layers.
	Record string
	// Read reads the rules of the setting must-be-encrypted, and Settings.SystemWorkloads.
	Read func() (rules mustencrypt.Rules, systemWorkloads []string, err error)

	mu       sync.Mutex
	read     os.FileInfo // of the record as the resolver has it
	rules    string      // that it has
	resolver *imagekeys.Resolver
}

// authorize returns an error that wraps away, unless all images of a container are plain and
// may be.
func (o *Offline) authorize(ctx context.Context, c Container, away error) error {
	resolver, system, err := o.current()
	if err != nil {
		return fmt.Errorf("%w, and it is unknown whether the image is encrypted: %w", away, err)
	}
	images, err := c.images(ctx, resolver)
	if err != nil {
		return fmt.Errorf("%w (%w)", err, away)
	}
	for i, image := range images {
		layers, err := resolver.Needs(ctx, criNamespace, image)
		layers = slices.DeleteFunc(layers, func(l imagekeys.Layer) bool { return l.Unproven && matchesAny(system, c.Namespace+"/") })
		if err == nil {
			err = checkEncrypted(ctx, resolver, c, image, i == 0)
		}
		if err != nil {
			return fmt.Errorf("%w (%w)", err, away)
		}
		if len(layers) > 0 {
			return fmt.Errorf("namespace %q may not use image %s now: it is encrypted, and pilot does not run: \"systemctl status pilot.service\" on the node says why (%w)", c.Namespace, nameOf(image), away)
		}
	}
	return nil
}

// current returns a resolver for the record and the rules as they are now, and the system's
// workloads.
func (o *Offline) current() (resolver *imagekeys.Resolver, system []string, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	info, err := os.Stat(o.Record)
	if err != nil {
		return nil, nil, err
	}
	rules, system, err := o.Read()
	if err != nil {
		return nil, nil, err
	}
	if o.resolver == nil || !os.SameFile(o.read, info) || !o.read.ModTime().Equal(info.ModTime()) || o.rules != rules.String() {
		record, err := layerkeys.Read(o.Record)
		if err != nil {
			return nil, nil, err
		}
		o.read, o.rules = info, rules.String()
		o.resolver = imagekeys.New(imagekeys.Config{Client: o.Client, Record: record, Rules: func() mustencrypt.Rules { return rules }})
	}
	return o.resolver, system, nil
}
