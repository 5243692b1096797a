package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/mustencrypt"
	"github.com/ctrlplane/pilot/internal/setting"
	"github.com/ctrlplane/pilot/internal/tomlfile"
	"github.com/ctrlplane/pilot/keyprovider"
	"github.com/ctrlplane/pilot/keyprovider/brokerconfig"
)

// configuration is what pilot.toml has. Each field is a setting: a key of the file, a
// flag and a PILOT_… variable. Those with reload:"no" take effect when pilot starts.
type configuration struct {
	Listen           address `toml:"listen" reload:"no" usage:"address to listen on: unix:///PATH (mode 0600) or HOST:PORT"`
	InsecureLoopback bool    `toml:"insecure-loopback" reload:"no" usage:"listen without TLS on a loopback address"`
	TLSCert          string  `toml:"tls-cert" reload:"no" usage:"certificate of the TLS server"`
	TLSKey           string  `toml:"tls-key" reload:"no" usage:"private key of tls-cert"`
	TLSClientCA      string  `toml:"tls-client-ca" reload:"no" usage:"CA of the clients' certificates"`
	brokerconfig.Settings
	KEKCacheTTL      time.Duration     `toml:"kek-cache-ttl" usage:"how long to keep a KEK after it was fetched; 0s: no limit"`
	KEKCacheGrace    time.Duration     `toml:"kek-cache-grace" usage:"how much longer to use a KEK while the broker gives no usable answer; 0s: no longer"`
	KEKCacheIdle     time.Duration     `toml:"kek-cache-idle" usage:"how long to keep a KEK after its last use; 0s: as kek-cache-ttl says"`
	KEKCacheSize     int               `toml:"kek-cache-size" usage:"how many KEKs to keep; 0: none"`
	DiffListen       unixAddress       `toml:"diff-listen" reload:"no" usage:"where to listen as containerd's differ: unix:///PATH (mode 0600), or off"`
	Containerd       socketPath        `toml:"containerd" reload:"no" usage:"containerd's socket, for the differ"`
	LayersAtOnce     int               `toml:"layers-at-once" reload:"no" usage:"how many encrypted layers the differ unpacks at once"`
	DecryptionKeys   string            `toml:"decryption-keys-path" reload:"no" usage:"directory of private keys for the differ to try, besides key providers"`
	MirrorListen     mirrorAddress     `toml:"mirror-listen" reload:"no" usage:"where to serve encrypted images as plain ones: HOST:PORT, or off"`
	MirrorSecretFile string            `toml:"mirror-secret-file" reload:"no" usage:"file with the secret of the mirror's callers that have no certificate, on a loopback address (mode 0600; made if it does not exist)"`
	MirrorUpstream   string            `toml:"mirror-upstream" reload:"no" usage:"registry of all names that the mirror is asked for, such as registry.example.com (default: the name's first part)"`
	MirrorAllowed    registryPatterns  `toml:"mirror-allowed-upstreams" reload:"no" usage:"registries that the mirror's callers may name, and from which layers are read lazily, separated by commas, with * for any text, as in *.example.com (default: all but those on loopback)"`
	MirrorHostsDir   string            `toml:"mirror-hosts-dir" reload:"no" usage:"directory, in the form of containerd's certs.d, of how the mirror and lazy pulling reach registries"`
	LazyListen       unixAddress       `toml:"lazy-listen" reload:"no" usage:"where to serve parts of layers to pilot's snapshotter: unix:///PATH (mode 0600), or off"`
	LayerRecord      string            `toml:"layer-record" reload:"no" usage:"file in which the differ records which KEKs have opened which layers (default: /var/lib/pilot/layers, or one beside it for another diff-listen)"`
	MustBeEncrypted  mustencrypt.Rules `toml:"must-be-encrypted" usage:"images that must be encrypted: tables in the file, or JSON, as in [{\"images\":[\"registry.example.com/team-a/**\"],\"keks\":[\"team-a\"]}]"`
	AdminListen      unixAddress       `toml:"admin-listen" reload:"no" usage:"admin socket for metrics, health and pprof: unix:///PATH (mode 0600), or off (default: unix:///run/pilot/admin.sock, unless listen is set)"`
	MetricsListen    string            "toml:\"metrics-listen\" reload:\"no\" usage:\"`HOST:PORT` for metrics and health, in plain HTTP (default: none)\""
	LogLevel         logrus.Level      `toml:"log-level" usage:"debug, info, warning or error"`

	WorkloadsListen   unixAddress      `toml:"workloads-listen" reload:"no" usage:"where containerd's NRI plugin asks which containers may be created: unix:///PATH (mode 0600), or off"`
	WorkloadTTL       time.Duration    `toml:"workload-verdict-ttl" usage:"how long to use the broker's verdict on a workload and a KEK; 0s: ask for each container"`
	WorkloadTokenKeys string           `toml:"workload-token-keys" usage:"file with the public keys of the cluster's tokens, as a JSON Web Key Set, to know pods' service accounts (default: none are known)"`
	NodeKeyWorkloads  workloadPatterns `toml:"node-key-workloads" usage:"workloads that may use images that the node decrypts with keys of its own: NAMESPACE/SERVICEACCOUNT with * and **, separated by commas (default: none)"`
	SystemWorkloads   workloadPatterns `toml:"system-workloads" usage:"workloads whose plain images need no proof that their layers are public: NAMESPACE/SERVICEACCOUNT with * and **, separated by commas"`
	KubeletDir        string           `toml:"kubelet-dir" usage:"the kubelet's directory, with the tokens of pods"`
}

// brokerSettings are those of the connection to the broker.
var brokerSettings = []string{"broker", "broker-ca", "broker-cert", "broker-key", "broker-token-file", "broker-timeout"}

// defaults returns the configuration where nothing is set.
func defaults() configuration {
	conf := configuration{
		Settings:      brokerconfig.Defaults(),
		Listen:        defaultListen,
		KEKCacheTTL:   5 * time.Minute,
		KEKCacheGrace: time.Hour,
		KEKCacheSize:  1024,
		DiffListen:    defaultDiffListen,
		Containerd:    "/run/containerd/containerd.sock",
		LayersAtOnce:  8,
		MirrorListen:  mirrorOff,
		LazyListen:    off,
		LogLevel:      logrus.InfoLevel,

		WorkloadsListen: off,
		WorkloadTTL:     10 * time.Second,
		SystemWorkloads: workloadPatterns{"kube-system/*"},
		KubeletDir:      "/var/lib/kubelet",
	}
	conf.Broker = defaultBroker
	return conf
}

// configFlags returns the flags that loadConfiguration reads. If some settings are
// shown, the command does not use the others: it takes them, and its help leaves them out.
func configFlags(shown ...string) []cli.Flag {
	flags := []cli.Flag{
		&cli.StringFlag{Name: "config", Usage: "`FILE` with pilot's settings (default: " + brokerconfig.DefaultFile + " if it exists)", Sources: cli.EnvVars("PILOT_CONFIG")},
		&cli.BoolFlag{Name: "original-defaults", Usage: "behave like the original pilot: listen on 127.0.0.1:50051, with its variables and defaults"},
	}
	conf := defaults()
	for _, s := range settings {
		flags = append(flags, s.Flag(&conf, len(shown) > 0 && !slices.Contains(shown, s.Name)))
	}
	return flags
}

// loadConfiguration returns the configuration. Flags override variables, which
// override the file, which overrides the defaults.
func loadConfiguration(c *cli.Command) (configuration, error) {
	conf := defaults()
	if c.Bool("original-defaults") {
		if err := originalDefaults(&conf, os.Getenv); err != nil {
			return conf, exit.UsageError(err)
		}
	}
	file := c.String("config")
	if err := readConfigFile(&conf, file); err != nil {
		return conf, exit.UsageError(err)
	}
	for _, s := range settings {
		if !c.IsSet(s.Name) {
			continue
		}
		if err := s.Set(&conf, fmt.Sprint(c.Value(s.Name))); err != nil {
			return conf, exit.Usagef("--%s (%s): %w", s.Name, s.Env(), err)
		}
	}
	if err := conf.check(); err != nil {
		return conf, exit.UsageError(err)
	}
	logrus.SetLevel(conf.LogLevel)
	return conf, nil
}

// readConfigFile reads a file over conf. Errors name the file, the line and the
// setting.
func readConfigFile(conf *configuration, name string) error {
	b, name, err := brokerconfig.File(name)
	if err != nil || b == nil {
		return err
	}
	return tomlfile.DecodeText(name, b, conf, func(key, text string) error {
		i := slices.IndexFunc(settings, func(s setting.Setting) bool { return s.Name == key })
		return settings[i].Set(conf, text)
	})
}

// defaultLayerRecord returns the record's file for a differ. Several of one machine have one
// each.
func defaultLayerRecord(diff unixAddress) string {
	const file = "/var/lib/pilot/layers"
	if diff == defaultDiffListen || diff == off {
		return file
	}
	return file + strings.ReplaceAll(diff.path(), "/", "-")
}

var errNoDiffer = errors.New("diff-listen: containerd's differ is for Linux: leave the setting out")

// check returns an error if settings can't work together.
func (c *configuration) check() error {
	if (c.TLSCert == "") != (c.TLSKey == "") || (c.TLSCert == "") != (c.TLSClientCA == "") {
		return errors.New("tls-cert, tls-key and tls-client-ca must be used together: over TCP, clients need a certificate")
	}
	if err := c.Settings.Check(); err != nil {
		return err
	}
	if c.LayersAtOnce == 0 {
		return errors.New("layers-at-once is 0: no encrypted layer could be unpacked")
	}
	if c.LayerRecord == "" {
		c.LayerRecord = defaultLayerRecord(c.DiffListen)
	}
	if !filepath.IsAbs(c.LayerRecord) {
		return fmt.Errorf("layer-record = %q is not the absolute path of a file", c.LayerRecord)
	}
	if c.MetricsListen != "" {
		if _, _, err := net.SplitHostPort(c.MetricsListen); err != nil {
			return fmt.Errorf("metrics-listen = %q is not HOST:PORT", c.MetricsListen)
		}
	}
	if err := c.checkMirror(); err != nil {
		return err
	}
	if err := c.checkWorkloads(); err != nil {
		return err
	}
	if runtime.GOOS != "linux" && c.DiffListen != off {
		return errNoDiffer
	}
	if c.Listen == "" {
		return nil // serve wants it
	}
	if _, isUnix := c.Listen.unix(); isUnix {
		if c.TLSCert != "" && c.MirrorListen == mirrorOff {
			return errors.New("tls-cert is for a TCP address, and listen is a unix socket")
		}
		return nil
	}
	if c.TLSCert == "" && !(c.InsecureLoopback && c.Listen.loopback()) {
		return fmt.Errorf("listen = %q needs tls-cert, tls-key and tls-client-ca, or insecure-loopback on a loopback address; a unix socket needs none", c.Listen)
	}
	return nil
}

// listensByTLS reports whether the key provider's clients need a certificate. On a unix
// socket they do not: tls-cert is the mirror's then.
func (c *configuration) listensByTLS() bool {
	_, isUnix := c.Listen.unix()
	return !isUnix && c.TLSCert != ""
}

// provider returns the key provider that the configuration describes.
func (c *configuration) provider(broker keyprovider.Broker, metrics *keyprovider.Metrics) *keyprovider.Provider {
	conf := c.Settings.ProviderConfig()
	conf.CacheTTL, conf.CacheGrace, conf.CacheIdle, conf.CacheSize = c.KEKCacheTTL, c.KEKCacheGrace, c.KEKCacheIdle, c.KEKCacheSize
	conf.Metrics = metrics
	return keyprovider.New(broker, conf)
}
