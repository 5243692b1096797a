// Command containerd-stargz-grpc is stargz-snapshotter's daemon, for tests. The project's
// own is in a module that Go's proxies do not have. Its flags and settings that are here
// are called as there.
package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/log"
	"github.com/containerd/stargz-snapshotter/service"
	"github.com/containerd/stargz-snapshotter/service/resolver"
	"github.com/pelletier/go-toml/v2"
	"google.golang.org/grpc"
)

type config struct {
	service.Config
	// Registry says how registries are reached, as CRI's does.
	Registry resolver.Registry `toml:"registry"`
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "containerd-stargz-grpc:", err)
		os.Exit(1)
	}
}

func run() error {
	address := flag.String("address", "/run/containerd-stargz-grpc/containerd-stargz-grpc.sock", "socket to listen on")
	root := flag.String("root", "/var/lib/containerd-stargz-grpc", "directory of the snapshots")
	file := flag.String("config", "/etc/containerd-stargz-grpc/config.toml", "file with the settings")
	level := flag.String("log-level", "info", "log level")
	flag.Parse()
	if err := log.SetLevel(*level); err != nil {
		return err
	}
	b, err := os.ReadFile(*file)
	if err != nil {
		return err
	}
	var conf config
	if err := toml.Unmarshal(b, &conf); err != nil {
		return fmt.Errorf("%s: %w", *file, err)
	}
	ctx := context.Background()
	s, err := service.NewStargzSnapshotterService(ctx, *root, &conf.Config,
		service.WithCustomRegistryHosts(resolver.RegistryHostsFromCRIConfig(ctx, conf.Registry)))
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(s))
	if err := os.MkdirAll(filepath.Dir(*address), 0o700); err != nil {
		return err
	}
	if err := os.RemoveAll(*address); err != nil {
		return err
	}
	l, err := net.Listen("unix", *address)
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	select {
	case err := <-ended:
		return err
	case got := <-signals:
		server.Stop()
		if got == os.Interrupt {
			return s.Close() // which unmounts all layers
		}
		return nil // containers may be using them
	}
}
