// Package builtin registers pilot's differ with a containerd that is compiled with it:
//
//	import _ "github.com/ctrlplane/pilot/plugin/builtin"
//
// It is named pilot, like the proxy plugin, and decrypts in containerd's own
// process. Layer keys are unwrapped by the key providers of an ocicrypt.conf,
// such as a "pilot serve", and private keys. In containerd's configuration:
//
//	[plugins.'io.containerd.differ.v1.pilot']
//	  key_providers = '/etc/pilot/ocicrypt.conf'
//	[plugins.'io.containerd.service.v1.diff-service']
//	  default = ['pilot']
//	[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
//	  platform = 'linux/amd64'
//	  snapshotter = 'overlayfs'
//	  differ = 'pilot'
//
// pilot is licensed under the GPL, version 3. A containerd that links this package is a
// work based on it: anyone who distributes that program must do so under GPL-3.0, with its
// complete source. A containerd that uses pilot as a proxy plugin or
// stream processor runs it as another program, and keeps its own license.
package builtin

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/platforms"
	containerdplugin "github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/ctrlplane/pilot/plugin"
	"github.com/ctrlplane/pilot/processor"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
	"github.com/ctrlplane/pilot/processor/ocicryptclient/grpcdial"
)

// Config is the plugin's section of containerd's configuration.
type Config struct {
	// KeyProviders is an ocicrypt.conf. Default: /etc/pilot/ocicrypt.conf,
	// if it exists.
	KeyProviders string `toml:"key_providers"`
	// DecryptionKeysPath is a directory of private keys to try, read for
	// each layer that needs one. Default: none.
	DecryptionKeysPath string `toml:"decryption_keys_path"`
	// LayersAtOnce is how many encrypted layers are unpacked at once at
	// most. Default: 8.
	LayersAtOnce int `toml:"layers_at_once"`
}

const defaultKeyProviders = "/etc/pilot/ocicrypt.conf"

func init() {
	registry.Register(&containerdplugin.Registration{
		Type: plugins.DiffPlugin,
		ID:   "pilot",
		Requires: []containerdplugin.Type{
			plugins.MetadataPlugin,
			plugins.MountManagerPlugin,
		},
		Config: &Config{},
		InitFn: func(ic *containerdplugin.InitContext) (any, error) {
			return newDiffer(ic, ic.Config.(*Config))
		},
	})
}

func newDiffer(ic *containerdplugin.InitContext, conf *Config) (interface {
	diff.Applier
	diff.Comparer
}, error) {
	md, err := ic.GetSingle(plugins.MetadataPlugin)
	if err != nil {
		return nil, err
	}
	var mounts mount.Manager
	if m, err := ic.GetSingle(plugins.MountManagerPlugin); err == nil {
		mounts = m.(mount.Manager)
	} else if !errors.Is(err, containerdplugin.ErrPluginNotFound) {
		return nil, err
	}

	keys, err := conf.keys()
	if err != nil {
		return nil, fmt.Errorf("key_providers: %w", err)
	}
	// What containerd itself shows as its metrics.
	c := plugin.Config{Layers: conf.LayersAtOnce, DecryptionKeysPath: conf.DecryptionKeysPath, Keys: keys, Metrics: prometheus.DefaultRegisterer}
	ic.Meta.Platforms = append(ic.Meta.Platforms, platforms.DefaultSpec())
	return plugin.New(md.(*metadata.DB).ContentStore(), mounts, c), nil
}

// keys returns the key providers of the configured file, and those of the file that
// $OCICRYPT_KEYPROVIDER_CONFIG names.
func (c *Config) keys() (processor.Keys, error) {
	all, err := ocicryptclient.FromFile(cmp.Or(c.KeyProviders, defaultKeyProviders), grpcdial.Call)
	if err != nil && (c.KeyProviders != "" || !errors.Is(err, fs.ErrNotExist)) {
		return processor.Keys{}, err
	}
	others, othersErr := ocicryptclient.FromEnvironment(grpcdial.Call)
	if othersErr == nil {
		othersErr = err
	}
	keys := processor.Keys{Providers: make(map[string]processor.KeyProvider), ProvidersErr: othersErr}
	maps.Copy(keys.Providers, others)
	maps.Copy(keys.Providers, all)
	return keys, nil
}
