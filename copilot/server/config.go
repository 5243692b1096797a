package server

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/copilot/policy"
	"github.com/ctrlplane/pilot/copilot/server/caller"
	"github.com/ctrlplane/pilot/copilot/server/keyring"
	"github.com/ctrlplane/pilot/internal/loopback"
	"github.com/ctrlplane/pilot/internal/regular"
	"github.com/ctrlplane/pilot/internal/tomlfile"
)

// Config is a broker's configuration: the settings of copilot.toml.
type Config struct {
	// Dir holds the store, unless Database does, the master key, the audit
	// log and the admin socket.
	Dir string `toml:"dir"`
	// Listen are addresses to listen on: unix:///PATH, or HOST:PORT.
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
	// NodeCA and NodeCAKey are PEM files of the CA that renews certificates for
	// clients that show theirs. Default: none are renewed. The CA has to be in
	// TLSClientCA too.
	NodeCA    string `toml:"node-ca"`
	NodeCAKey string `toml:"node-ca-key"`
	// PublicKeysCert and PublicKeysKey are PEM files of the certificate that signs the
	// public halves of KEKs, and its key. Default: none are given out.
	PublicKeysCert string `toml:"public-keys-cert"`
	PublicKeysKey  string `toml:"public-keys-key"`
	// InsecureLoopback allows a loopback address without TLS, where clients
	// without a token are anonymous.
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
	// BackupRecipients is a file with the age recipients that backups are sealed to, unless
	// others are named.
	BackupRecipients string `toml:"backup-recipients"`
	// Approvals are which operations need a second admin.
	Approvals Approvals `toml:"approvals"`
	// WrapLimit is how many keys a version of a KEK may wrap before a new one
	// is made. Default, and at most: 2^32 (NIST SP 800-38D, section 8.3).
	WrapLimit int64 `toml:"wrap-limit"`
	// MetricsListen is HOST:PORT for metrics, health and readiness, in plain
	// HTTP. They are on the admin socket too.
	MetricsListen string `toml:"metrics-listen"`
	// Issuers of bearer tokens, by name, which is the prefix of their
	// identities.
	Issuers map[string]caller.Issuer `toml:"issuers"`
	// Backends are KMSs by name: a type, and the settings of that type.
	Backends map[string]map[string]any `toml:"backends"`
	// KMS are the types that Backends may have. The program that makes the server says
	// which those are.
	KMS kms.Types `toml:"-"`
	// KEKs that are in Backends.
	KEKs map[string]keyring.Location `toml:"keks"`
	// MasterKey is the key in one of Backends that wraps the master key. Default: the master
	// key is in a file.
	MasterKey keyring.Location `toml:"master-key"`
}

// MaxWraps is how many keys one AES-GCM key may wrap with random nonces of 96
// bits: NIST SP 800-38D, section 8.3.
const MaxWraps = 1 << 32

// ReadConfig reads a configuration file over c. Errors name the file and the line.
func (c *Config) ReadConfig(name string) error {
	b, err := regular.ReadText(name, regular.MaxConfig)
	if err != nil {
		return err
	}
	return tomlfile.Decode(name, b, c)
}

// PolicyIssuers returns the issuers whose tokens are accepted. It is never nil.
func (c Config) PolicyIssuers() policy.Issuers {
	issuers := make(policy.Issuers)
	for name, i := range c.Issuers {
		issuers[name] = i.URL
	}
	return issuers
}

// IssuerNames returns the names of the issuers whose tokens are accepted, in order.
// It is never nil.
func (c Config) IssuerNames() []string {
	return append([]string{}, slices.Sorted(maps.Keys(c.Issuers))...)
}

func (c Config) hasTLS() bool { return c.TLSCert != "" || c.TLSKey != "" || c.TLSClientCA != "" }

// Wrapping returns the key that wraps the master key, if one does.
func (c Config) Wrapping() []keystore.Wrapping {
	if c.MasterKey == (keyring.Location{}) {
		return nil
	}
	open, _ := c.openBackend(c.MasterKey.Backend)
	return []keystore.Wrapping{{Backend: c.MasterKey.Backend, Path: c.MasterKey.Path, Open: open}}
}

// openBackend returns what opens a KMS of the configuration.
func (c Config) openBackend(name string) (open func() (kms.Backend, error), ok bool) {
	settings, ok := c.Backends[name]
	return func() (kms.Backend, error) { return keyring.OpenBackend(c.KMS, settings) }, ok
}

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

// check rejects settings that can't work, and fills in defaults.
func (c *Config) check() error {
	if c.Dir == "" {
		return errors.New("dir is not set")
	}
	if c.WrapLimit == 0 {
		c.WrapLimit = MaxWraps
	}
	if c.WrapLimit < 2*keyring.ExportWraps || c.WrapLimit > MaxWraps {
		return fmt.Errorf("wrap-limit %d is not from %d to %d", c.WrapLimit, 2*keyring.ExportWraps, int64(MaxWraps))
	}
	if c.AuditLog == auditDatabase && c.Database == "" {
		return errors.New("audit-log is \"database\", and database is not set")
	}
	if _, err := c.socketMode(); err != nil {
		return err
	}
	if err := c.Approvals.check(); err != nil {
		return err
	}
	if c.hasTLS() && (c.TLSCert == "" || c.TLSKey == "" || c.TLSClientCA == "" && len(c.Issuers) == 0) {
		return errors.New("tls-cert, tls-key and tls-client-ca must be set together")
	}
	if (c.NodeCA == "") != (c.NodeCAKey == "") {
		return errors.New("node-ca and node-ca-key must be set together")
	}
	if c.NodeCA != "" && c.TLSClientCA == "" {
		return errors.New("node-ca needs tls-client-ca: it renews certificates that clients show")
	}
	if (c.PublicKeysCert == "") != (c.PublicKeysKey == "") {
		return errors.New("public-keys-cert and public-keys-key must be set together")
	}
	if c.MetricsListen != "" {
		if _, _, err := net.SplitHostPort(c.MetricsListen); err != nil {
			return fmt.Errorf("metrics-listen %s is not HOST:PORT", c.MetricsListen)
		}
	}
	for name, i := range c.Issuers {
		if err := i.Check(name); err != nil {
			return fmt.Errorf("issuers.%s: %w", name, err)
		}
	}
	if c.MasterKey != (keyring.Location{}) {
		if _, ok := c.Backends[c.MasterKey.Backend]; !ok {
			return fmt.Errorf("master-key: no such backend: %q", c.MasterKey.Backend)
		}
		if c.MasterKey.Path == "" {
			return fmt.Errorf("master-key: path is not set: it is which key in %s wraps the master key", c.MasterKey.Backend)
		}
	}
	for id, k := range c.KEKs {
		if err := keystore.CheckID(id); err != nil {
			return fmt.Errorf("keks: %w", err)
		}
		if _, ok := c.Backends[k.Backend]; !ok {
			return fmt.Errorf("keks.%q: no such backend: %q", id, k.Backend)
		}
		if k.Path == "" {
			return fmt.Errorf("keks.%q: path is not set: it is where the KEK is in %s", id, k.Backend)
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
		return 0, fmt.Errorf("socket-mode %q is not an octal mode such as 0600, 0660 or 0666", c.SocketMode)
	}
	return mode, nil
}

// checkListen rejects addresses where anybody could get KEKs.
func (c Config) checkListen() error {
	if len(c.Listen) == 0 {
		return errors.New("listen is not set: use --listen, as in --listen unix:///run/copilot/copilot.sock")
	}
	for _, address := range c.Listen {
		if path, ok := strings.CutPrefix(address, "unix://"); ok {
			if !filepath.IsAbs(path) {
				return fmt.Errorf("--listen %s: a unix socket needs an absolute path, as in unix:///run/copilot/copilot.sock", address)
			}
			continue
		}
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			return fmt.Errorf("--listen %s is neither unix:///PATH nor HOST:PORT", address)
		}
		switch {
		case c.hasTLS():
		case !loopback.Is(host):
			return fmt.Errorf("--listen %s: other machines can connect, so it needs --tls-cert, --tls-key and --tls-client-ca", address)
		case !c.InsecureLoopback:
			return fmt.Errorf("--listen %s: every user of this machine could read every KEK: use a unix socket, TLS, or --insecure-loopback", address)
		}
	}
	return nil
}
