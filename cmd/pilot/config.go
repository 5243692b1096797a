package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"runtime"
	"slices"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v3"

	brokerclient "github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/configfile"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/regular"
	"github.com/ctrlplane/pilot/internal/tomlfile"
	"github.com/ctrlplane/pilot/keyprovider"
)

// defaultConfigFile is read if it exists. A file that is named must exist.
var defaultConfigFile = configfile.Default("pilot", "pilot.toml")

// configuration is what pilot.toml has. Each field is a setting: a key of the file, a
// flag and a PILOT_… variable. Those with reload:"no" take effect when pilot starts.
type configuration struct {
	Listen           address            `toml:"listen" reload:"no" usage:"address to listen on: unix:///PATH (mode 0600) or HOST:PORT"`
	InsecureLoopback bool               `toml:"insecure-loopback" reload:"no" usage:"listen without TLS on a loopback address"`
	TLSCert          string             `toml:"tls-cert" reload:"no" usage:"certificate of the TLS server"`
	TLSKey           string             `toml:"tls-key" reload:"no" usage:"private key of tls-cert"`
	TLSClientCA      string             `toml:"tls-client-ca" reload:"no" usage:"CA of the clients' certificates"`
	Broker           urls               `toml:"broker" usage:"copilot's address: unix:///PATH, https://HOST:PORT, or one ending in /api/v1/key; several, separated by commas, have the same KEKs"`
	BrokerCA         string             `toml:"broker-ca" usage:"CA of the broker's certificate (default: the system's)"`
	BrokerCert       string             `toml:"broker-cert" usage:"client certificate to show the broker"`
	BrokerKey        string             `toml:"broker-key" usage:"private key of broker-cert"`
	BrokerTokenFile  string             `toml:"broker-token-file" usage:"file with a bearer token (JWT) to show the broker, over https or a unix socket"`
	TokenSource      tokenSource        `toml:"broker-token-source" usage:"where to get such a token from: github-actions (the job's own), or env:NAME (an environment variable)"`
	TokenAudience    string             `toml:"broker-token-audience" usage:"audience of github-actions tokens, as copilot's issuer has it (default: the broker's host)"`
	BrokerTimeout    time.Duration      `toml:"broker-timeout" usage:"how long to try to get an answer from the brokers, such as 10s"`
	ProviderName     providerNames      `toml:"provider-name" reload:"no" usage:"pilot's name among the key providers of ocicrypt.conf; several, separated by commas, if it has several there"`
	AnnotationFormat keyprovider.Format `toml:"annotation-format" usage:"how to write wrapped keys: A256GCMKW, copilot (the broker wraps), or original"`
	DefaultKEKs      kekIDs             `toml:"default-keks" usage:"KEKs to try on keys in the original's format, separated by commas"`
	KEKCacheTTL      time.Duration      `toml:"kek-cache-ttl" usage:"how long to keep a KEK after it was fetched; 0s: no limit"`
	KEKCacheGrace    time.Duration      `toml:"kek-cache-grace" usage:"how much longer to use a KEK while the broker gives no usable answer; 0s: no longer"`
	KEKCacheIdle     time.Duration      `toml:"kek-cache-idle" usage:"how long to keep a KEK after its last use; 0s: as kek-cache-ttl says"`
	KEKCacheSize     int                `toml:"kek-cache-size" usage:"how many KEKs to keep; 0: none"`
	DiffListen       unixAddress        `toml:"diff-listen" reload:"no" usage:"where to listen as containerd's differ: unix:///PATH (mode 0600), or off"`
	Containerd       socketPath         `toml:"containerd" reload:"no" usage:"containerd's socket, for the differ"`
	LayersAtOnce     int                `toml:"layers-at-once" reload:"no" usage:"how many encrypted layers the differ unpacks at once"`
	DecryptionKeys   string             `toml:"decryption-keys-path" reload:"no" usage:"directory of private keys for the differ to try, besides key providers"`
	MirrorListen     mirrorAddress      `toml:"mirror-listen" reload:"no" usage:"where to serve encrypted images as plain ones: HOST:PORT, or off"`
	MirrorSecretFile string             `toml:"mirror-secret-file" reload:"no" usage:"file with the secret of the mirror's callers that have no certificate, on a loopback address (mode 0600; made if it does not exist)"`
	MirrorUpstream   string             `toml:"mirror-upstream" reload:"no" usage:"registry of all names that the mirror is asked for, such as registry.example.com (default: the name's first part)"`
	MirrorAllowed    registryPatterns   `toml:"mirror-allowed-upstreams" reload:"no" usage:"registries that the mirror's callers may name, separated by commas, with * for any text, as in *.example.com (default: all but those on loopback)"`
	MirrorHostsDir   string             `toml:"mirror-hosts-dir" reload:"no" usage:"directory, in the form of containerd's certs.d, of how the mirror reaches registries"`
	AdminListen      unixAddress        `toml:"admin-listen" reload:"no" usage:"admin socket for metrics, health and pprof: unix:///PATH (mode 0600), or off (default: unix:///run/pilot/admin.sock, unless listen is set)"`
	MetricsListen    string             "toml:\"metrics-listen\" reload:\"no\" usage:\"`HOST:PORT` for metrics and health, in plain HTTP (default: none)\""
	LogLevel         logrus.Level       `toml:"log-level" usage:"debug, info, warning or error"`
}

// brokerSettings are those of the connection to the broker.
var brokerSettings = []string{"broker", "broker-ca", "broker-cert", "broker-key", "broker-token-file", "broker-timeout"}

// defaults returns the configuration where nothing is set.
func defaults() configuration {
	return configuration{
		Listen:           defaultListen,
		Broker:           defaultBroker,
		BrokerTimeout:    10 * time.Second,
		ProviderName:     providerNames{"pilot"},
		AnnotationFormat: keyprovider.FormatA256GCMKW,
		KEKCacheTTL:      5 * time.Minute,
		KEKCacheGrace:    time.Hour,
		KEKCacheSize:     1024,
		DiffListen:       defaultDiffListen,
		Containerd:       "/run/containerd/containerd.sock",
		LayersAtOnce:     8,
		MirrorListen:     mirrorOff,
		LogLevel:         logrus.InfoLevel,
	}
}

// configFlags returns the flags that loadConfiguration reads. If some settings are
// shown, the command does not use the others: it takes them, and its help leaves them out.
func configFlags(shown ...string) []cli.Flag {
	flags := []cli.Flag{
		&cli.StringFlag{Name: "config", Usage: "`FILE` with pilot's settings (default: " + defaultConfigFile + " if it exists)", Sources: cli.EnvVars("PILOT_CONFIG")},
		&cli.BoolFlag{Name: "original-defaults", Usage: "behave like the original pilot: listen on 127.0.0.1:50051, with its variables and defaults"},
	}
	conf := defaults()
	for _, s := range settings {
		flags = append(flags, s.flag(&conf, len(shown) > 0 && !slices.Contains(shown, s.name)))
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
		if !c.IsSet(s.name) {
			continue
		}
		if err := s.set(&conf, fmt.Sprint(c.Value(s.name))); err != nil {
			return conf, exit.Usagef("--%s (%s): %w", s.name, s.env(), err)
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
	required := name != ""
	if !required {
		name = defaultConfigFile
	}
	if name == "" {
		return nil
	}
	b, err := regular.ReadText(name, regular.MaxConfig)
	if errors.Is(err, fs.ErrNotExist) && !required {
		return nil
	}
	if err != nil {
		return err
	}
	return tomlfile.DecodeText(name, b, conf, func(key, text string) error {
		i := slices.IndexFunc(settings, func(s setting) bool { return s.name == key })
		return settings[i].set(conf, text)
	})
}

var errNoDiffer = errors.New("diff-listen: containerd's differ is for Linux: leave the setting out")

// check returns an error if settings can't work together.
func (c *configuration) check() error {
	if (c.TLSCert == "") != (c.TLSKey == "") || (c.TLSCert == "") != (c.TLSClientCA == "") {
		return errors.New("tls-cert, tls-key and tls-client-ca must be used together: over TCP, clients need a certificate")
	}
	if (c.BrokerCert == "") != (c.BrokerKey == "") {
		return errors.New("broker-cert and broker-key must be used together")
	}
	if err := c.checkToken(); err != nil {
		return err
	}
	if c.BrokerTimeout == 0 {
		return errors.New("broker-timeout is 0: no request to the broker could succeed")
	}
	if c.LayersAtOnce == 0 {
		return errors.New("layers-at-once is 0: no encrypted layer could be unpacked")
	}
	if c.MetricsListen != "" {
		if _, _, err := net.SplitHostPort(c.MetricsListen); err != nil {
			return fmt.Errorf("metrics-listen = %q is not HOST:PORT", c.MetricsListen)
		}
	}
	if err := c.checkMirror(); err != nil {
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

// checkToken returns an error if settings of the broker's token can't work together. It
// sets the audience.
func (c *configuration) checkToken() error {
	if c.BrokerTokenFile != "" && c.TokenSource != "" {
		return errors.New("broker-token-file and broker-token-source are mutually exclusive")
	}
	if c.TokenSource != gitHubActions {
		if c.TokenAudience != "" {
			return errors.New("broker-token-audience is for broker-token-source = \"github-actions\"; other tokens have theirs already")
		}
		return nil
	}
	if c.TokenAudience != "" {
		return nil
	}
	for _, broker := range c.Broker {
		u, err := url.Parse(broker)
		if err != nil || u.Scheme != "https" || c.TokenAudience != "" && u.Hostname() != c.TokenAudience {
			return errors.New("broker-token-audience is not set, and the brokers do not have one https host that it could be: set it to the audience of copilot's issuer")
		}
		c.TokenAudience = u.Hostname()
	}
	return nil
}

// client returns the client of the brokers that the configuration names.
func (c *configuration) client() (*brokerclient.Client, error) {
	if len(c.Broker) == 0 {
		return nil, exit.Usagef("broker is not set: use --broker https://HOST:PORT, PILOT_BROKER or %s", defaultConfigFile)
	}
	client, err := brokerclient.New(brokerclient.Config{
		URLs:           c.Broker,
		CAFile:         c.BrokerCA,
		CertFile:       c.BrokerCert,
		KeyFile:        c.BrokerKey,
		TokenFile:      c.BrokerTokenFile,
		TokenVariable:  c.TokenSource.variable(),
		GitHubAudience: c.TokenAudience,
		Timeout:        c.BrokerTimeout,
	})
	if err != nil {
		if errors.Is(err, fs.ErrPermission) {
			err = fmt.Errorf("%w: run pilot as root, or give this user a pilot.toml with a certificate and key of its own", err)
		}
		return nil, exit.Usagef("broker: %w", err)
	}
	if client.Original() && c.AnnotationFormat == keyprovider.FormatCopilot {
		return nil, exit.Usagef("annotation-format %s: a broker with the original's API does not wrap", c.AnnotationFormat)
	}
	return client, nil
}

// provider returns the key provider that the configuration describes.
func (c *configuration) provider(broker *brokerclient.Client, metrics *keyprovider.Metrics) *keyprovider.Provider {
	return keyprovider.New(broker, keyprovider.Config{
		Name:        c.ProviderName[0],
		Format:      c.AnnotationFormat,
		DefaultKEKs: c.DefaultKEKs,
		CacheTTL:    c.KEKCacheTTL,
		CacheGrace:  c.KEKCacheGrace,
		CacheIdle:   c.KEKCacheIdle,
		CacheSize:   c.KEKCacheSize,
		Metrics:     metrics,
	})
}
