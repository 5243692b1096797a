package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2/unstable"
	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v2"

	brokerclient "github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/regular"
	"github.com/ctrlplane/pilot/internal/tomlfile"
	"github.com/ctrlplane/pilot/keyprovider"
)

// defaultConfigFile is read if it exists; another has to exist.
const defaultConfigFile = "/etc/pilot/pilot.toml"

const (
	defaultListen      = "unix:///run/pilot/keyprovider.sock"
	defaultAdminSocket = "/run/pilot/admin.sock"
)

// configuration is what pilot.toml holds. Each setting is also a flag and a
// PILOT_… variable: see settings.
type configuration struct {
	Listen           address
	InsecureLoopback boolean
	TLSCert          text
	TLSKey           text
	TLSClientCA      text
	Broker           urls
	BrokerCA         text
	BrokerCert       text
	BrokerKey        text
	BrokerTokenFile  text
	BrokerTimeout    duration
	ProviderName     providerNames
	AnnotationFormat keyprovider.Format
	DefaultKEKs      kekIDs
	KEKCacheTTL      duration
	KEKCacheGrace    duration
	KEKCacheIdle     duration
	KEKCacheSize     count
	DiffListen       unixAddress
	Containerd       socketPath
	LayersAtOnce     count
	DecryptionKeys   text
	AdminListen      unixAddress
	MetricsListen    text
	LogLevel         logLevel
}

// defaults are the settings of a pilot that is told nothing.
func defaults() configuration {
	return configuration{
		Listen:           defaultListen,
		Broker:           urls{"unix:///run/copilot/copilot.sock"},
		BrokerTimeout:    duration(10 * time.Second),
		ProviderName:     providerNames{"pilot"},
		AnnotationFormat: keyprovider.FormatA256GCMKW,
		KEKCacheTTL:      duration(5 * time.Minute),
		KEKCacheGrace:    duration(time.Hour),
		KEKCacheSize:     1024,
		DiffListen:       "unix:///run/pilot/diff.sock",
		Containerd:       "/run/containerd/containerd.sock",
		LayersAtOnce:     8,
		LogLevel:         logLevel(logrus.InfoLevel),
	}
}

// setting is a value of the configuration that can be given by name.
type setting struct {
	name, usage string
	value       func(*configuration) value
}

// value is a setting that reads itself from text.
type value interface {
	UnmarshalText([]byte) error
	String() string
}

var settings = []setting{
	{"listen", "where to answer: unix:///PATH (mode 0600) or HOST:PORT", func(c *configuration) value { return &c.Listen }},
	{"insecure-loopback", "answer without TLS on a loopback address", func(c *configuration) value { return &c.InsecureLoopback }},
	{"tls-cert", "certificate to answer TLS with", func(c *configuration) value { return &c.TLSCert }},
	{"tls-key", "private key of tls-cert", func(c *configuration) value { return &c.TLSKey }},
	{"tls-client-ca", "CA of the clients that may ask", func(c *configuration) value { return &c.TLSClientCA }},
	{"broker", "copilot's address: unix:///PATH, https://HOST:PORT, or one ending in /api/v1/key; several, separated by commas, have the same KEKs", func(c *configuration) value { return &c.Broker }},
	{"broker-ca", "CA of the broker's certificate (default: the system's)", func(c *configuration) value { return &c.BrokerCA }},
	{"broker-cert", "client certificate to show the broker", func(c *configuration) value { return &c.BrokerCert }},
	{"broker-key", "private key of broker-cert", func(c *configuration) value { return &c.BrokerKey }},
	{"broker-token-file", "file with a bearer token (JWT) to show the broker, over https or a unix socket", func(c *configuration) value { return &c.BrokerTokenFile }},
	{"broker-timeout", "how long to try to get an answer from the brokers, such as 10s", func(c *configuration) value { return &c.BrokerTimeout }},
	{"provider-name", "pilot's name among the key providers of ocicrypt.conf; several, separated by commas, if it has several there", func(c *configuration) value { return &c.ProviderName }},
	{"annotation-format", "how to write wrapped keys: A256GCMKW, copilot (the broker wraps), or original", func(c *configuration) value { return &c.AnnotationFormat }},
	{"default-keks", "KEKs to try on keys in the original's format, separated by commas", func(c *configuration) value { return &c.DefaultKEKs }},
	{"kek-cache-ttl", "how long to keep a KEK after it was fetched; 0s: for ever", func(c *configuration) value { return &c.KEKCacheTTL }},
	{"kek-cache-grace", "how much longer to use a KEK as long as the broker gives no usable answer; 0s: no longer", func(c *configuration) value { return &c.KEKCacheGrace }},
	{"kek-cache-idle", "how long to keep a KEK after its last use; 0s: as kek-cache-ttl says", func(c *configuration) value { return &c.KEKCacheIdle }},
	{"kek-cache-size", "how many KEKs to keep; 0: none", func(c *configuration) value { return &c.KEKCacheSize }},
	{"diff-listen", "where to answer as containerd's differ: unix:///PATH (mode 0600), or off", func(c *configuration) value { return &c.DiffListen }},
	{"containerd", "containerd's socket, for the differ", func(c *configuration) value { return &c.Containerd }},
	{"layers-at-once", "how many encrypted layers the differ unpacks at once", func(c *configuration) value { return &c.LayersAtOnce }},
	{"decryption-keys-path", "directory of private keys for the differ to try, besides key providers", func(c *configuration) value { return &c.DecryptionKeys }},
	{"admin-listen", "where to tell root metrics, health and profiles: unix:///PATH (mode 0600), or off (default: unix:///run/pilot/admin.sock, unless listen is set)", func(c *configuration) value { return &c.AdminListen }},
	{"metrics-listen", "`HOST:PORT` for metrics and health, in plain HTTP (default: none)", func(c *configuration) value { return &c.MetricsListen }},
	{"log-level", "debug, info, warning or error", func(c *configuration) value { return &c.LogLevel }},
}

func (s setting) env() string {
	return "PILOT_" + strings.ToUpper(strings.ReplaceAll(s.name, "-", "_"))
}

// unsetEmptyVariables makes a variable that is empty one that is not there, as
// whoever leaves it empty in a unit or a manifest means it.
func unsetEmptyVariables() {
	for _, s := range settings {
		if os.Getenv(s.env()) == "" {
			os.Unsetenv(s.env())
		}
	}
}

// set sets the setting from text: a flag, a variable, or a line of the file.
func (s setting) set(conf *configuration, v string) error {
	return s.value(conf).UnmarshalText([]byte(v))
}

// configFlags returns the flags that loadConfiguration reads.
func configFlags() []cli.Flag {
	flags := []cli.Flag{
		&cli.StringFlag{Name: "config", Usage: "`FILE` with the settings below (default: " + defaultConfigFile + " if it exists)", EnvVars: []string{"PILOT_CONFIG"}},
		&cli.BoolFlag{Name: "original-defaults", Usage: "answer as the original pilot did: on 127.0.0.1:50051, with its variables and defaults"},
	}
	conf := defaults()
	for _, s := range settings {
		env := []string{s.env()}
		if _, ok := s.value(&conf).(*boolean); ok {
			flags = append(flags, &cli.BoolFlag{Name: s.name, Usage: s.usage, EnvVars: env})
		} else {
			flags = append(flags, &cli.StringFlag{Name: s.name, Usage: s.usage, EnvVars: env, DefaultText: s.value(&conf).String()})
		}
	}
	return flags
}

// loadConfiguration returns the configuration: the defaults, changed by the
// file, changed by variables, changed by flags.
func loadConfiguration(c *cli.Context) (configuration, error) {
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
	logrus.SetLevel(logrus.Level(conf.LogLevel))
	return conf, nil
}

// readConfigFile reads a file over conf. Errors name the file, the line and
// the key.
func readConfigFile(conf *configuration, name string) error {
	required := name != ""
	if !required {
		name = defaultConfigFile
	}
	b, err := regular.Read(name, regular.MaxConfig)
	if errors.Is(err, fs.ErrNotExist) && !required {
		return nil
	}
	if err != nil {
		return err
	}
	if err := tomlfile.Decode(name, b, new(map[string]any)); err != nil {
		return err
	}

	// It is TOML. Walk it with the parser, which knows the lines.
	var p unstable.Parser
	p.Reset(b)
	for p.NextExpression() {
		key, line := keyOf(&p, p.Expression())
		i := slices.IndexFunc(settings, func(s setting) bool { return s.name == key })
		if i < 0 || p.Expression().Kind != unstable.KeyValue {
			return fmt.Errorf("%s:%d: %s: there is no such setting", name, line, key)
		}
		v, err := textOf(p.Expression().Value())
		if err == nil {
			err = settings[i].set(conf, v)
		}
		if err != nil {
			return fmt.Errorf("%s:%d: %s: %w", name, line, key, err)
		}
	}
	return p.Error()
}

// keyOf returns the dotted key of an expression and its line.
func keyOf(p *unstable.Parser, e *unstable.Node) (key string, line int) {
	var names []string
	for it := e.Key(); it.Next(); {
		if line == 0 {
			line = p.Shape(it.Node().Raw).Start.Line
		}
		names = append(names, string(it.Node().Data))
	}
	return strings.Join(names, "."), line
}

// textOf returns a scalar as text, and an array of strings with commas between
// them.
func textOf(v *unstable.Node) (string, error) {
	switch v.Kind {
	case unstable.String, unstable.Bool, unstable.Integer:
		return string(v.Data), nil
	case unstable.Array:
		var words []string
		for it := v.Children(); it.Next(); {
			if it.Node().Kind == unstable.Comment {
				continue
			}
			if it.Node().Kind != unstable.String {
				return "", errors.New("the array holds something other than strings")
			}
			words = append(words, string(it.Node().Data))
		}
		return strings.Join(words, ","), nil
	}
	return "", fmt.Errorf("a value of kind %s is not possible here", v.Kind)
}

// check refuses settings that can't work together.
func (c *configuration) check() error {
	if (c.TLSCert == "") != (c.TLSKey == "") || (c.TLSCert == "") != (c.TLSClientCA == "") {
		return errors.New("tls-cert, tls-key and tls-client-ca go together: over TCP only clients with a certificate may ask")
	}
	if (c.BrokerCert == "") != (c.BrokerKey == "") {
		return errors.New("broker-cert and broker-key go together")
	}
	if c.BrokerTimeout == 0 {
		return errors.New("broker-timeout is 0: the broker would never be asked")
	}
	if c.LayersAtOnce == 0 {
		return errors.New("layers-at-once is 0: no encrypted layer would ever be unpacked")
	}
	if c.MetricsListen != "" {
		if _, _, err := net.SplitHostPort(string(c.MetricsListen)); err != nil {
			return fmt.Errorf("metrics-listen = %q is not HOST:PORT", c.MetricsListen)
		}
	}
	if _, isUnix := c.Listen.unix(); isUnix {
		if c.TLSCert != "" {
			return errors.New("tls-cert is for a TCP address, and listen is a unix socket")
		}
		return nil
	}
	if c.TLSCert == "" && !(bool(c.InsecureLoopback) && c.Listen.loopback()) {
		return fmt.Errorf("listen = %q needs tls-cert, tls-key and tls-client-ca, or insecure-loopback on a loopback address; a unix socket needs none", c.Listen)
	}
	return nil
}

// client returns the client of the brokers that the configuration names.
func (c *configuration) client() (*brokerclient.Client, error) {
	client, err := brokerclient.New(brokerclient.Config{
		URLs:      c.Broker,
		CAFile:    string(c.BrokerCA),
		CertFile:  string(c.BrokerCert),
		KeyFile:   string(c.BrokerKey),
		TokenFile: string(c.BrokerTokenFile),
		Timeout:   time.Duration(c.BrokerTimeout),
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
		CacheTTL:    time.Duration(c.KEKCacheTTL),
		CacheGrace:  time.Duration(c.KEKCacheGrace),
		CacheIdle:   time.Duration(c.KEKCacheIdle),
		CacheSize:   int(c.KEKCacheSize),
		Metrics:     metrics,
	})
}
