package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/containerd/nri/pkg/api"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/urfave/cli/v3"
	"golang.org/x/sync/errgroup"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/mustencrypt"
	"github.com/ctrlplane/pilot/internal/setting"
	"github.com/ctrlplane/pilot/internal/tomlfile"
	"github.com/ctrlplane/pilot/internal/unixsocket"
	"github.com/ctrlplane/pilot/plugin"
	"github.com/ctrlplane/pilot/plugin/workloads"
)

// serveWorkloads adds to g what decides for containerd's NRI plugin, until ctx is done.
func (c *configuration) serveWorkloads(ctx context.Context, g *errgroup.Group, provider *reloadable, l layers, metrics prometheus.Registerer) error {
	listener, err := unixsocket.Listen(c.WorkloadsListen.path())
	if err != nil {
		return fmt.Errorf("workloads-listen: %w", err)
	}
	a := workloads.New(l.resolver, func() workloads.Settings {
		conf, broker := provider.used()
		return workloads.Settings{
			Broker:           broker,
			TTL:              conf.WorkloadTTL,
			Grace:            conf.KEKCacheGrace,
			NodeKeyWorkloads: conf.NodeKeyWorkloads,
			SystemWorkloads:  conf.SystemWorkloads,
			Accounts:         workloads.Accounts{KubeletDir: conf.KubeletDir, KeysFile: conf.WorkloadTokenKeys},
		}
	}, metrics)
	provider.afterReload = append(provider.afterReload, a.Forget)
	serveHTTPUntilDone(ctx, g, "workloads-listen", workloads.NewServer(a), listener)
	return nil
}

// checkWorkloads returns an error if a path can't be used.
func (c *configuration) checkWorkloads() error {
	for name, path := range map[string]string{"workload-token-keys": c.WorkloadTokenKeys, "kubelet-dir": c.KubeletDir} {
		if path != "" && !filepath.IsAbs(path) {
			return fmt.Errorf("%s = %q is not an absolute path", name, path)
		}
	}
	return nil
}

var nriPluginCommand = &cli.Command{
	Name:  "nri-plugin",
	Usage: "ask pilot about each container, as a plugin that containerd starts",
	Description: `containerd starts the programs in /opt/nri/plugins. "pilot node install --workloads"
puts one there, 00-pilot, which is this command. It asks pilot, at workloads-listen,
whether a container may be created. While pilot gives no answer, it lets only
containers of images run that are not encrypted.

It reads pilot.toml, and over that what containerd passes to it: settings in
/etc/nri/conf.d/00-pilot.conf, in the same form.

Example, the whole file /opt/nri/plugins/00-pilot:
   #!/usr/bin/pilot nri-plugin`,
	Action: func(ctx context.Context, c *cli.Command) error {
		if os.Getenv(api.PluginSocketEnvVar) == "" {
			return exit.Usagef("containerd starts this program: put it into its plugin_path by \"pilot node install --workloads\"")
		}
		ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
		defer stop()
		p := workloads.Plugin{Open: openPlugin}
		return p.Run(ctx)
	},
}

// openPlugin reads the settings of the NRI plugin. containerd has passed some of them.
func openPlugin(passed string) (socket string, offline *workloads.Offline, err error) {
	conf, err := pluginSettings(passed)
	if err != nil {
		return "", nil, err
	}
	client, err := plugin.Dial(string(conf.Containerd))
	if err != nil {
		return "", nil, fmt.Errorf("containerd: %w", err)
	}
	return conf.WorkloadsListen.path(), &workloads.Offline{
		Client: client,
		Record: conf.LayerRecord,
		Read: func() (mustencrypt.Rules, []string, error) {
			conf, err := pluginSettings(passed)
			return conf.MustBeEncrypted, conf.SystemWorkloads, err
		},
	}, nil
}

// pluginSettings returns the settings of pilot.toml, and those that containerd has passed.
func pluginSettings(passed string) (configuration, error) {
	conf := defaults()
	if err := readConfigFile(&conf, ""); err != nil {
		return conf, err
	}
	err := tomlfile.DecodeText(workloads.PluginFile+".conf", []byte(passed), &conf, func(key, text string) error {
		i := slices.IndexFunc(settings, func(s setting.Setting) bool { return s.Name == key })
		return settings[i].Set(&conf, text)
	})
	if conf.LayerRecord == "" {
		conf.LayerRecord = defaultLayerRecord(conf.DiffListen)
	}
	return conf, err
}
