package server

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/internal/loopback"
	"github.com/ctrlplane/pilot/internal/regular"
	"github.com/ctrlplane/pilot/internal/tomlfile"
)

// Config says where a server keeps things, where it answers, and whom. It is
// what copilot.toml holds.
type Config struct {
	// Dir holds the store, unless Database does, the master key, the audit
	// log and the admin socket.
	Dir string `toml:"dir"`
	// Listen are addresses: unix:///PATH, or HOST:PORT.
	Listen []string `toml:"listen"`
	// SocketMode is the mode of unix sockets to listen on, in octal. Default:
	// 0600.
	SocketMode string `toml:"socket-mode"`
	// TLSCert, TLSKey and TLSClientCA are PEM files. An address that is
	// neither a unix socket nor loopback needs them. Clients there need a
	// certificate from TLSClientCA, or a token from one of Issuers.
	TLSCert     string `toml:"tls-cert"`
	TLSKey      string `toml:"tls-key"`
	TLSClientCA string `toml:"tls-client-ca"`
	// NodeCA and NodeCAKey are a CA's PEM files, with which clients' certificates
	// are renewed for those who show them. Default: they are not. The CA has to
	// be in TLSClientCA too.
	NodeCA    string `toml:"node-ca"`
	NodeCAKey string `toml:"node-ca-key"`
	// InsecureLoopback allows a loopback address without TLS, at which
	// everybody is anonymous who has no token.
	InsecureLoopback bool `toml:"insecure-loopback"`
	// Database is a PostgreSQL URL, postgres://USER@HOST/NAME; empty: a file
	// in Dir.
	Database string `toml:"database"`
	// AuditLog is a file, "-" for standard output, or "database". Default:
	// the database if there is one, else audit.log in Dir.
	AuditLog string `toml:"audit-log"`
	// Policy is a file. Default: root, and the user that the server runs as,
	// may use each KEK over unix sockets.
	Policy string `toml:"policy"`
	// WrapLimit is how many keys a version of a KEK may wrap before a new one
	// is made. Default, and at most: 2^32 (NIST SP 800-38D, section 8.3).
	WrapLimit int64 `toml:"wrap-limit"`
	// MetricsListen is HOST:PORT for metrics, health and readiness, in plain
	// HTTP. They are on the admin socket too.
	MetricsListen string `toml:"metrics-listen"`
	// Issuers of bearer tokens, by the name that identities from there begin
	// with.
	Issuers map[string]Issuer `toml:"issuers"`
	// Backends are KMSs by name: a type, and the settings of that type.
	Backends map[string]map[string]any `toml:"backends"`
	// KMS are the types that Backends may have. The program that makes the server says
	// which those are.
	KMS kms.Types `toml:"-"`
	// KEKs that live in backends.
	KEKs map[string]KEKConfig `toml:"keks"`
}

// KEKConfig says where a KEK lives.
type KEKConfig struct {
	Backend string `toml:"backend"`
	Path    string `toml:"path"` // there
}

// Issuer is an OpenID Connect issuer whose tokens are accepted.
type Issuer struct {
	// URL is the issuer, as its tokens say.
	URL string `toml:"url"`
	// Audience is what tokens have to be for.
	Audience string `toml:"audience"`
	// CA holds the CA certificates that the issuer's must come from, in PEM.
	// Default: the system's.
	CA string `toml:"ca"`
	// TokenFile holds a token to show the issuer when its keys are asked for,
	// as Kubernetes wants by default.
	TokenFile string `toml:"token-file"`
	// KeysURL is where the keys are. Default: where the issuer's
	// /.well-known/openid-configuration says.
	KeysURL string `toml:"keys-url"`
}

// MaxWraps is how many keys one AES-GCM key may wrap with random nonces of 96
// bits: NIST SP 800-38D, section 8.3.
const MaxWraps = 1 << 32

// ReadConfig reads a configuration file over c. Errors name the file and the
// line.
func (c *Config) ReadConfig(name string) error {
	b, err := regular.Read(name, regular.MaxConfig)
	if err != nil {
		return err
	}
	return tomlfile.Decode(name, b, c)
}

// IssuerNames returns the names of the issuers whose tokens are accepted, in order.
// It is never nil.
func (c Config) IssuerNames() []string {
	return append([]string{}, slices.Sorted(maps.Keys(c.Issuers))...)
}

func (c Config) hasTLS() bool { return c.TLSCert != "" || c.TLSKey != "" || c.TLSClientCA != "" }

// AuditTo returns where the audit log goes: a file, "-" or "database".
func (c Config) AuditTo() string {
	switch {
	case c.AuditLog != "":
		return c.AuditLog
	case c.Database != "":
		return auditDatabase
	}
	return filepath.Join(c.Dir, "audit.log")
}

const auditDatabase = "database"

// check refuses what would not work, and fills in defaults.
func (c *Config) check() error {
	if c.Dir == "" {
		return errors.New("dir is not set")
	}
	if c.WrapLimit == 0 {
		c.WrapLimit = MaxWraps
	}
	if c.WrapLimit < 2*exportWraps || c.WrapLimit > MaxWraps {
		return fmt.Errorf("wrap-limit %d is not from %d to %d", c.WrapLimit, 2*exportWraps, int64(MaxWraps))
	}
	if c.AuditLog == auditDatabase && c.Database == "" {
		return errors.New("audit-log is in the database, and database is not set")
	}
	if _, err := c.socketMode(); err != nil {
		return err
	}
	if c.hasTLS() && (c.TLSCert == "" || c.TLSKey == "" || c.TLSClientCA == "" && len(c.Issuers) == 0) {
		return errors.New("tls-cert, tls-key and tls-client-ca go together")
	}
	if (c.NodeCA == "") != (c.NodeCAKey == "") {
		return errors.New("node-ca and node-ca-key go together")
	}
	if c.NodeCA != "" && c.TLSClientCA == "" {
		return errors.New("node-ca is for clients with certificates, and tls-client-ca is not set")
	}
	if c.MetricsListen != "" {
		if _, _, err := net.SplitHostPort(c.MetricsListen); err != nil {
			return fmt.Errorf("metrics-listen %s: it is not HOST:PORT", c.MetricsListen)
		}
	}
	for name, i := range c.Issuers {
		if err := i.check(name); err != nil {
			return fmt.Errorf("issuers.%s: %w", name, err)
		}
	}
	for id, k := range c.KEKs {
		if err := keystore.CheckID(id); err != nil {
			return fmt.Errorf("keks: %w", err)
		}
		if _, ok := c.Backends[k.Backend]; !ok {
			return fmt.Errorf("keks.%q: there is no backend %q", id, k.Backend)
		}
		if k.Path == "" {
			return fmt.Errorf("keks.%q: path says where it is in %s", id, k.Backend)
		}
	}
	return nil
}

func (c Config) socketMode() (os.FileMode, error) {
	if c.SocketMode == "" {
		return 0o600, nil
	}
	var mode os.FileMode
	if n, err := fmt.Sscanf(c.SocketMode, "%o", &mode); n != 1 || err != nil || mode&^0o666 != 0 {
		return 0, fmt.Errorf("socket-mode %q is none: 0600, 0660 or 0666, in octal", c.SocketMode)
	}
	return mode, nil
}

// checkListen refuses addresses at which KEKs would be there for everybody.
func (c Config) checkListen() error {
	if len(c.Listen) == 0 {
		return errors.New("nowhere to listen: give --listen, as in --listen unix:///run/copilot/copilot.sock")
	}
	for _, address := range c.Listen {
		if path, ok := strings.CutPrefix(address, "unix://"); ok {
			if !filepath.IsAbs(path) {
				return fmt.Errorf("--listen %s: a unix socket has an absolute path, as in unix:///run/copilot/copilot.sock", address)
			}
			continue
		}
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			return fmt.Errorf("--listen %s: it is neither unix:///PATH nor HOST:PORT", address)
		}
		switch {
		case c.hasTLS():
		case !loopback.Is(host):
			return fmt.Errorf("--listen %s: other machines reach this, so it needs --tls-cert, --tls-key and --tls-client-ca", address)
		case !c.InsecureLoopback:
			return fmt.Errorf("--listen %s: every user of this machine would get every KEK: use a unix socket, TLS, or --insecure-loopback", address)
		}
	}
	return nil
}

func (i Issuer) check(name string) error {
	if slices.Contains([]string{"spiffe", "dns", "cn", "uid", "anonymous", ""}, name) || strings.ContainsAny(name, ":/*") {
		return errors.New("it can't have this name, which tells other identities")
	}
	if i.URL == "" || i.Audience == "" {
		return errors.New("it needs url and audience")
	}
	for _, u := range []string{i.URL, i.KeysURL} {
		if u == "" {
			continue
		}
		parsed, err := url.Parse(u)
		if err != nil || parsed.Scheme != "https" && !(parsed.Scheme == "http" && loopback.Is(parsed.Hostname())) {
			return fmt.Errorf("%s: keys from there could be anybody's: use https", u)
		}
	}
	return nil
}
