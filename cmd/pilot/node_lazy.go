//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/install"
	"github.com/ctrlplane/pilot/plugin"
	"github.com/ctrlplane/pilot/plugin/snapshotter"
)

var forgetCommand = &cli.Command{
	Name:  "forget-images",
	Usage: "remove images that containers can't be started from since lazy pulling was switched on or off",
	Description: `Removes from containerd those of the kubelet's images whose layers containerd does
not have, and which only the earlier snapshotter has unpacked. The kubelet pulls
them again. "pilot node install --now" does this itself.

Example:
   pilot node forget-images`,
	Action: nodeForgetImages,
}

func nodeForgetImages(ctx context.Context, c *cli.Command) error {
	if err := nodeArguments(c); err != nil {
		return err
	}
	is, err := install.Installed(install.Options{})
	if err != nil {
		return err
	}
	err = withContainerd(ctx, socketOf(is), func(ctx context.Context, client *client.Client) error {
		return forgetImages(ctx, client, lazyChange(is.Lazy))
	})
	if err != nil {
		return fmt.Errorf("images without layers are left in containerd: run \"pilot node forget-images\" once it runs: %w", err)
	}
	return nil
}

// lazyChange is the change of snapshotter that has led to what pilot's is for now.
func lazyChange(mode containerd.LazyMode) snapshotter.Change {
	return snapshotter.Change{Snapshotter: containerd.LazySnapshotter, To: mode == containerd.LazyOn}
}

// socketOf returns the socket of the containerd that was set up.
func socketOf(is install.Installation) string {
	if is.Address != "" {
		return is.Address
	}
	return containerd.DefaultAddress
}

// containerdTimeout bounds what is asked of containerd, which may just be starting.
const containerdTimeout = 30 * time.Second

// withContainerd calls f with the containerd at a socket.
func withContainerd(ctx context.Context, socket string, f func(ctx context.Context, client *client.Client) error) error {
	ctx, cancel := context.WithTimeout(ctx, containerdTimeout)
	defer cancel()
	client, err := plugin.Dial(socket)
	if err != nil {
		return err
	}
	defer client.Close()
	return f(ctx, client)
}

// forgetImages removes the images that a change has stranded, and logs their names.
func forgetImages(ctx context.Context, client *client.Client, change snapshotter.Change) error {
	removed, err := change.ForgetImages(ctx, client)
	for _, i := range removed {
		if !strings.HasPrefix(i.Name, "sha256:") { // which has another name too
			logrus.WithFields(logrus.Fields{"image": i.Name, "namespace": i.Namespace}).Info("image removed from containerd, which does not have its layers: it has to be pulled again")
		}
	}
	return err
}

// warnStranded prints which images have to be pulled again. That containerd does not say
// keeps nobody from installing.
func warnStranded(ctx context.Context, is install.Installation) {
	var list []snapshotter.Image
	_ = withContainerd(ctx, socketOf(is), func(ctx context.Context, client *client.Client) (err error) {
		list, err = lazyChange(is.Lazy).Stranded(ctx, client)
		return err
	})
	list = slices.DeleteFunc(list, func(i snapshotter.Image) bool { return strings.HasPrefix(i.Name, "sha256:") })
	if len(list) > 0 {
		fmt.Println("containerd does not have the layers of these images, so no new container of them starts until they are pulled again, for which the last of the commands below removes them:")
	}
	for _, i := range list {
		fmt.Printf("  %s (namespace %s)\n", i.Name, i.Namespace)
	}
}

// use is what a containerd uses pilot's snapshotter for.
type use struct {
	containers []string // that have it
	pulls      bool     // the kubelet's images are pulled into it
	err        error    // containerd does not say
}

func (u use) none() bool { return u.err == nil && !u.pulls && len(u.containers) == 0 }

func (u use) String() string {
	const most = 20
	switch n := len(u.containers); {
	case u.err != nil:
		return "containerd does not say which have it: " + u.err.Error()
	case u.pulls:
		return "containerd has to be restarted first"
	case n > most:
		return fmt.Sprintf("%s and %d more", strings.Join(u.containers[:most], ", "), n-most)
	}
	return strings.Join(u.containers, ", ")
}

// lazyUse returns what the containerd of an installation uses pilot's snapshotter for.
func lazyUse(ctx context.Context, is install.Installation) (u use) {
	u.err = withContainerd(ctx, socketOf(is), func(ctx context.Context, client *client.Client) error {
		var containing error
		u.containers, containing = snapshotter.Containers(ctx, client, containerd.LazySnapshotter)
		list, err := client.IntrospectionService().Plugins(ctx, "type=="+plugins.SnapshotPlugin.String())
		if err != nil || containing != nil {
			return errors.Join(err, containing)
		}
		for _, p := range list.Plugins {
			u.pulls = u.pulls || p.ID == containerd.LazySnapshotter && containerd.LazyExported(p.Exports) == containerd.LazyOn
		}
		return nil
	})
	return u
}
