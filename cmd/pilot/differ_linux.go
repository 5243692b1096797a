package main

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/ctrlplane/pilot/internal/layerkeys"
	"github.com/ctrlplane/pilot/internal/tracing"
	"github.com/ctrlplane/pilot/plugin"
	"github.com/ctrlplane/pilot/plugin/imagekeys"
	"github.com/ctrlplane/pilot/processor"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
	"github.com/ctrlplane/pilot/processor/ocicryptclient/grpcdial"
)

// cleanMounts makes containerd's library mount snapshots below dir while it unpacks
// layers, and removes the mounts that a killed pilot left there.
func cleanMounts(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := mount.SetTempMountLocation(dir); err != nil {
		return err
	}
	warnings, err := mount.CleanupTempMounts(0)
	if err != nil {
		return err
	}
	for _, w := range warnings {
		logrus.WithError(w).Warn("mount of an earlier pilot not removed")
	}
	// Killed right before a mount or after an unmount.
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
			logrus.WithError(err).Warn("directory of an earlier pilot not removed")
		}
	}
	return nil
}

// layers is what is known of the layers that containerd has unpacked.
type layers struct {
	record   *layerkeys.Record
	resolver *imagekeys.Resolver
}

// openLayers opens the record of which keys have opened which layers. It is kept until ctx
// is done.
func (c *configuration) openLayers(ctx context.Context, g *errgroup.Group, provider *reloadable) (layers, error) {
	client, err := plugin.Dial(string(c.Containerd))
	if err != nil {
		return layers{}, fmt.Errorf("containerd: %w", err)
	}
	record, err := layerkeys.Open(c.LayerRecord)
	if err != nil {
		return layers{}, fmt.Errorf("layer-record: %w", err)
	}
	resolver := imagekeys.New(imagekeys.Config{
		Client:             client,
		Record:             record,
		Keys:               c.keys(provider),
		DecryptionKeysPath: c.DecryptionKeys,
		Rules:              provider.rules,
	})
	g.Go(func() error {
		resolver.Run(ctx)
		return nil
	})
	return layers{record, resolver}, nil
}

// diffServer returns a gRPC server that is a differ for containerd.
func (c *configuration) diffServer(provider *reloadable, l layers, metrics prometheus.Registerer) (*grpc.Server, error) {
	if err := cleanMounts(filepath.Join(filepath.Dir(c.DiffListen.path()), "mounts")); err != nil {
		return nil, fmt.Errorf("diff-listen: %w", err)
	}
	client, err := plugin.Dial(string(c.Containerd))
	if err != nil {
		return nil, fmt.Errorf("containerd: %w", err)
	}
	s := plugin.NewServer(client, plugin.Config{
		Layers:             c.LayersAtOnce,
		DecryptionKeysPath: c.DecryptionKeys,
		Keys:               c.keys(provider),
		Metrics:            metrics,
		Record:             l.record,
		Rules:              provider.rules,
	}, grpc.ConnectionTimeout(connectTimeout), grpc.ChainUnaryInterceptor(tracing.UnaryServer()))
	healthpb.RegisterHealthServer(s, health.NewServer())
	return s, nil
}

// keys returns pilot's own key provider, and those of the file that
// $OCICRYPT_KEYPROVIDER_CONFIG names.
func (c *configuration) keys(own processor.KeyProvider) processor.Keys {
	others, err := ocicryptclient.FromEnvironment(grpcdial.Call)
	keys := processor.Keys{Providers: make(map[string]processor.KeyProvider), ProvidersErr: err}
	maps.Copy(keys.Providers, others)
	for _, name := range c.ProviderName {
		keys.Providers[name] = own
	}
	return keys
}
