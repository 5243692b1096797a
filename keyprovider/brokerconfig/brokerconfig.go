// Package brokerconfig has the settings of programs that are clients of a broker: where it
// is, how they authenticate, and what they ask of it. They are those of pilot.toml.
package brokerconfig

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"slices"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/configfile"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/regular"
	"github.com/ctrlplane/pilot/internal/setting"
	"github.com/ctrlplane/pilot/internal/tomlfile"
	"github.com/ctrlplane/pilot/keyprovider"
)

// DefaultFile is read if it exists and no other file is named. It may be "".
var DefaultFile = configfile.Default("pilot", "pilot.toml")

// Settings are settings of pilot.toml.
type Settings struct {
	Broker           URLs               `toml:"broker" usage:"copilot's address: unix:///PATH, https://HOST:PORT, or one ending in /api/v1/key; several, separated by commas, have the same KEKs"`
	BrokerCA         string             `toml:"broker-ca" usage:"CA of the broker's certificate (default: the system's)"`
	BrokerCert       string             `toml:"broker-cert" usage:"client certificate to show the broker"`
	BrokerKey        string             `toml:"broker-key" usage:"private key of broker-cert"`
	BrokerTokenFile  string             `toml:"broker-token-file" usage:"file with a bearer token (JWT) to show the broker, over https or a unix socket"`
	TokenSource      TokenSource        `toml:"broker-token-source" usage:"where to get such a token from: github-actions (the job's own), or env:NAME (an environment variable)"`
	TokenAudience    string             `toml:"broker-token-audience" usage:"audience of github-actions tokens, as copilot's issuer has it (default: the broker's host)"`
	BrokerTimeout    time.Duration      `toml:"broker-timeout" usage:"how long to try to get an answer from the brokers, such as 10s"`
	ProviderName     ProviderNames      `toml:"provider-name" reload:"no" usage:"pilot's name among the key providers of ocicrypt.conf; several, separated by commas, if it has several there"`
	AnnotationFormat keyprovider.Format `toml:"annotation-format" usage:"how to write wrapped keys: A256GCMKW, copilot (the broker wraps), or original"`
	DefaultKEKs      KEKIDs             `toml:"default-keks" usage:"KEKs to try on keys in the original's format, separated by commas"`
	KBSKEKs          KBSKEKs            `toml:"kbs-keks" usage:"KEKs behind the URIs of Confidential Containers, as in kbs:///default/key/team-a=team-a, or …=team-a@2 if the KBS has version 2 there, separated by commas"`
	PublicKeys       Paths              `toml:"public-keys" usage:"public halves of KEKs to wrap for without the broker, as copilot keys public prints them: files, or directories of *.pub files, separated by commas"`
	PublicKeysCA     string             `toml:"public-keys-ca" usage:"CA of the broker that signed public-keys (default: broker-ca)"`
	AgeIdentities    Paths              `toml:"age-identities" usage:"files of age identities that unwrap what was wrapped for recipients of age, separated by commas"`
}

// Defaults returns the settings where nothing is set. They name no broker.
func Defaults() Settings {
	return Settings{
		BrokerTimeout:    10 * time.Second,
		ProviderName:     ProviderNames{"pilot"},
		AnnotationFormat: keyprovider.FormatA256GCMKW,
	}
}

// Check returns an error if settings can't work together. It sets the token's audience.
func (s *Settings) Check() error {
	if (s.BrokerCert == "") != (s.BrokerKey == "") {
		return errors.New("broker-cert and broker-key must be used together")
	}
	if err := s.checkToken(); err != nil {
		return err
	}
	if len(s.PublicKeys) > 0 && s.AnnotationFormat != keyprovider.FormatA256GCMKW {
		return fmt.Errorf("public-keys and annotation-format %s are mutually exclusive: what is wrapped for a public key has a format of its own", s.AnnotationFormat)
	}
	if s.BrokerTimeout == 0 {
		return errors.New("broker-timeout is 0: no request to the broker could succeed")
	}
	return nil
}

// checkToken returns an error if settings of the broker's token can't work together. It
// sets the audience.
func (s *Settings) checkToken() error {
	if s.BrokerTokenFile != "" && s.TokenSource != "" {
		return errors.New("broker-token-file and broker-token-source are mutually exclusive")
	}
	if s.TokenSource != GitHubActions {
		if s.TokenAudience != "" {
			return errors.New("broker-token-audience is for broker-token-source = \"github-actions\"; other tokens have theirs already")
		}
		return nil
	}
	if s.TokenAudience != "" {
		return nil
	}
	for _, broker := range s.Broker {
		u, err := url.Parse(broker)
		if err != nil || u.Scheme != "https" || s.TokenAudience != "" && u.Hostname() != s.TokenAudience {
			return errors.New("broker-token-audience is not set, and the brokers do not have one https host that it could be: set it to the audience of copilot's issuer")
		}
		s.TokenAudience = u.Hostname()
	}
	return nil
}

// ProviderConfig returns the configuration of a key provider with these settings.
func (s *Settings) ProviderConfig() keyprovider.Config {
	return keyprovider.Config{
		Name:          s.ProviderName[0],
		Format:        s.AnnotationFormat,
		DefaultKEKs:   s.DefaultKEKs,
		KBSKEKs:       s.KBSKEKs.byURI(),
		PublicKey:     s.PublicKey,
		AgeIdentities: s.AgeIdentities,
	}
}

// Client returns the client of the brokers.
func (s *Settings) Client() (*client.Client, error) {
	if len(s.Broker) == 0 {
		return nil, exit.Usagef("broker is not set: use --broker https://HOST:PORT, PILOT_BROKER or %s", DefaultFile)
	}
	c, err := client.New(client.Config{
		URLs:           s.Broker,
		CAFile:         s.BrokerCA,
		CertFile:       s.BrokerCert,
		KeyFile:        s.BrokerKey,
		TokenFile:      s.BrokerTokenFile,
		TokenVariable:  s.TokenSource.variable(),
		GitHubAudience: s.TokenAudience,
		Timeout:        s.BrokerTimeout,
	})
	if err != nil {
		if errors.Is(err, fs.ErrPermission) {
			err = fmt.Errorf("%w: run this as root, or give this user a pilot.toml with a certificate and key of its own", err)
		}
		return nil, exit.Usagef("broker: %w", err)
	}
	if c.Original() && s.AnnotationFormat == keyprovider.FormatCopilot {
		return nil, exit.Usagef("annotation-format %s: a broker with the original's API does not wrap", s.AnnotationFormat)
	}
	return c, nil
}

var all = setting.Of[Settings]()

// configFlag names the file of settings, as configVariable does.
const (
	configFlag     = "config"
	configVariable = "PILOT_CONFIG"
)

// Flags returns flags for the settings, which [Read] reads.
func Flags() []cli.Flag {
	flags := []cli.Flag{&cli.StringFlag{Name: configFlag, Usage: "`FILE` with pilot's settings (default: " + DefaultFile + " if it exists) [$" + configVariable + "]"}}
	defaults := Defaults()
	for _, s := range all {
		flags = append(flags, &cli.StringFlag{Name: s.Name, Usage: s.Usage + " [$" + s.Env() + "]", DefaultText: s.Text(&defaults)})
	}
	return flags
}

// Given reports whether a command has one of the flags on its command line.
func Given(cmd *cli.Command) bool {
	return cmd.IsSet(configFlag) || slices.ContainsFunc(all, func(s setting.Setting) bool { return cmd.IsSet(s.Name) })
}

// Read returns the settings of a command that has no other settings of pilot's. Flags, if it
// has them, override variables, which override the file.
func Read(cmd *cli.Command) (Settings, error) {
	s := Defaults()
	file := os.Getenv(configVariable)
	if cmd.IsSet(configFlag) {
		file = cmd.String(configFlag)
	}
	if err := s.readFile(file); err != nil {
		return s, exit.UsageError(err)
	}
	for _, one := range all {
		text := os.Getenv(one.Env())
		if cmd.IsSet(one.Name) {
			text = cmd.String(one.Name)
		}
		if text == "" {
			continue
		}
		if err := one.Set(&s, text); err != nil {
			return s, exit.Usagef("--%s (%s): %w", one.Name, one.Env(), err)
		}
	}
	if err := s.Check(); err != nil {
		return s, exit.UsageError(err)
	}
	return s, nil
}

// readFile reads a file over s, or, without a name, the default file if it exists.
func (s *Settings) readFile(name string) error {
	b, name, err := File(name)
	if err != nil || b == nil {
		return err
	}
	return tomlfile.DecodePart(name, b, s, func(key, text string) error {
		i := slices.IndexFunc(all, func(one setting.Setting) bool { return one.Name == key })
		return all[i].Set(s, text)
	})
}

// File returns the content of a file of settings and its name. Without a name it is the
// default file, and the content is nil if that does not exist.
func File(name string) (content []byte, path string, err error) {
	required := name != ""
	if !required {
		name = DefaultFile
	}
	if name == "" {
		return nil, "", nil
	}
	b, err := regular.ReadText(name, regular.MaxConfig)
	if errors.Is(err, fs.ErrNotExist) && !required {
		return nil, name, nil
	}
	return b, name, err
}
