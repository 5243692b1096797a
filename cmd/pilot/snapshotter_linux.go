package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/containerd/containerd/v2/client"
	sdnotify "github.com/coreos/go-systemd/v22/daemon"
	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/unixsocket"
	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/install"
	"github.com/ctrlplane/pilot/plugin/snapshotter"
)

var snapshotterCommand = &cli.Command{
	Name:  "snapshotter",
	Usage: "run containerd's snapshotter for lazy pulling, as a daemon",
	Description: `Mounts the layers of encrypted eStargz images before they are pulled, with what
"pilot serve" decrypts at its lazy-listen, and keeps all other snapshots as
overlayfs does. "pilot node install --lazy" sets it up.

Containers that run from it can't read their files while it is stopped, and for
good once it was restarted.

Example:
   pilot snapshotter`,
	Flags: []cli.Flag{
		&cli.StringFlag{Name: "listen", Usage: "`SOCKET` for containerd (mode 0600)", Value: containerd.LazySocket},
		&cli.StringFlag{Name: "root", Usage: "`DIRECTORY` of the snapshots", Value: containerd.LazyRoot},
		&cli.StringFlag{Name: "lazy", Usage: "`SOCKET` of lazy-listen", Value: install.LazySocket},
		&cli.Uint64Flag{Name: "max-memory", Usage: "in `MiB`: beyond that, no more layers are mounted, and images are pulled as a whole (default: a quarter of the machine's memory)"},
		&cli.StringFlag{Name: "log-level", Usage: "debug, info, warning or error", Value: "info"},
		&cli.BoolFlag{Name: "remove", Usage: "remove its mounts and the default directory of the snapshots, once it is stopped, and the images in containerd that no container can be started from then"},
		&cli.BoolFlag{Name: "force", Usage: "with --remove: go on although containers run from it, which lose their files"},
		&cli.StringFlag{Name: "containerd", Usage: "with --remove: containerd's `SOCKET`", Value: string(defaults().Containerd)},
	},
	Action: serveSnapshotter,
}

func serveSnapshotter(ctx context.Context, c *cli.Command) error {
	if c.NArg() > 0 {
		return exit.Usagef("snapshotter takes no argument, and got %q", c.Args().First())
	}
	level, err := logrus.ParseLevel(c.String("log-level"))
	if err != nil {
		return exit.Usagef("--log-level: %w", err)
	}
	logrus.SetLevel(level)
	if c.Bool("remove") {
		if err := install.RemoveSnapshots(c.Bool("force")); err != nil {
			return err
		}
		err := withContainerd(ctx, c.String("containerd"), func(ctx context.Context, client *client.Client) error {
			return errors.Join(snapshotter.ReleaseContainers(ctx, client, containerd.LazySnapshotter), forgetImages(ctx, client, lazyChange(containerd.LazyOff)))
		})
		if err != nil {
			// That containerd does not run keeps nobody from removing pilot.
			logrus.WithError(err).Warn("images that were pulled lazily are left in containerd, which can't start containers from them: remove them with \"crictl rmi\"")
		}
		return nil
	}
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	// First, so that no other process uses the directory.
	l, err := unixsocket.Listen(c.String("listen"))
	if err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	defer l.Close()
	s, err := snapshotter.New(ctx, snapshotter.Config{Root: c.String("root"), Lazy: c.String("lazy"), MaxMemory: c.Uint64("max-memory") << 20})
	if err != nil {
		return fmt.Errorf("--root %s: %w", c.String("root"), err)
	}
	logrus.WithFields(logrus.Fields{"listen": c.String("listen"), "root": c.String("root")}).Info("pilot's snapshotter serves")
	if _, err := sdnotify.SdNotify(false, sdnotify.SdNotifyReady); err != nil {
		logrus.WithError(err).Warn("systemd not notified")
	}
	return snapshotter.Serve(ctx, s, l)
}
