//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/copilot/pki"
	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/regular"
	"github.com/ctrlplane/pilot/internal/tomlfile"
)

const (
	defaultConfigDir = "/etc/copilot"
	caFor            = 10 * 365 * 24 * time.Hour
	serverFor        = 365 * 24 * time.Hour
	clientFor        = 90 * 24 * time.Hour
)

var initCommand = &cli.Command{
	Name:  "init",
	Usage: "write a working configuration, with a CA, a server certificate and an admin's",
	Description: `Writes into --config-dir: copilot.toml and policy.toml, a private CA (ca.pem,
ca-key.pem), the server's certificate (server.pem, server-key.pem) and an
admin's (admin.pem, admin-key.pem). It overwrites nothing, and uses an existing CA,
such as one from a backup. The user copilot, which the package creates for the
service, gets the server's key and the store, and no other key.

The master key, which seals the store, is a file in --dir that copilot makes, unless
--tpm has this machine's TPM seal it, or --kms names a file with [backends] and
[master-key] for copilot.toml. Then init makes the store, and no file has the key.

Example:
   copilot init --host copilot.example.com --trust-domain example.com`,
	Flags: []cli.Flag{
		configDirFlag(),
		&cli.StringFlag{Name: "dir", Usage: "`DIRECTORY` of the store", Value: defaultDir, Sources: cli.EnvVars("COPILOT_DIR")},
		&cli.StringSliceFlag{Name: "host", Usage: "`NAME` or address that nodes connect to; may be repeated", Required: true},
		&cli.IntFlag{Name: "port", Usage: "`PORT` to listen on", Value: 8443},
		&cli.BoolFlag{Name: "node-ca", Usage: "let copilot renew nodes' certificates, with a separate CA (copilot certs node-ca)"},
		&cli.StringFlag{Name: "kms", Usage: "`FILE` with the [backends] and the [master-key] of copilot.toml, for a master key that a KMS wraps"},
		&cli.BoolFlag{Name: "tpm", Usage: "have this machine's TPM 2.0 seal the master key"},
		&cli.StringFlag{Name: "tpm-pcrs", Usage: "with --tpm, unseal only while these `PCRS` are as they are now, as in sha256:7"},
		&cli.StringFlag{Name: "trust-domain", Usage: "trust `DOMAIN` of SPIFFE IDs (default: the first --host that is a name)"},
	},
	Action: initialize,
}

func configDirFlag() cli.Flag {
	return &cli.StringFlag{Name: "config-dir", Usage: "`DIRECTORY` of the configuration and the CA", Value: defaultConfigDir}
}

func initialize(ctx context.Context, c *cli.Command) error {
	if err := noArguments(c); err != nil {
		return err
	}
	hosts := c.StringSlice("host")
	domain := c.String("trust-domain")
	for _, h := range hosts {
		if domain == "" && net.ParseIP(h) == nil {
			domain = h
		}
	}
	if domain == "" {
		return exit.Usagef("init: --host is only an address: set --trust-domain, as in example.com")
	}
	if err := checkHosts(hosts); err != nil {
		return exit.Usagef("init: %w", err)
	}
	dir, err := filepath.Abs(c.String("config-dir"))
	if err != nil {
		return err
	}
	store, err := filepath.Abs(c.String("dir"))
	if err != nil {
		return err
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"copilot.toml", "policy.toml", "server.pem", "server-key.pem", "admin.pem", "admin-key.pem"} {
		if _, err := os.Lstat(in(name)); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("init: %s exists, and nothing is overwritten: move it away, or use another --config-dir", in(name))
		}
	}
	text := fmt.Sprintf(configText, store, c.Int("port"), dir)
	if c.Bool("node-ca") {
		text += nodeCAText(dir, "")
	}
	wrapped, err := masterText(c)
	if err != nil {
		return err
	}
	if err := makeStore(store); err != nil {
		return fmt.Errorf("init: %w", err)
	}
	if wrapped != "" {
		text += wrapped
		if err := makeWrapped(ctx, store, text); err != nil {
			return fmt.Errorf("init: %w", err)
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	ca, err := existingCA(dir, c.String("trust-domain"))
	if ca == nil && err == nil {
		ca, err = pki.Create(dir, domain, caFor)
	}
	if err != nil {
		return fmt.Errorf("init: %w", err)
	}
	domain = ca.TrustDomain()
	if err := ca.IssueServer(hosts, serverFor, in("server.pem"), in("server-key.pem"), giveToService); err != nil {
		return fmt.Errorf("init: %w", err)
	}
	admin := pki.Client{Path: "admin", Hold: serverFor}
	if err := ca.IssueClient(admin, in("admin.pem"), in("admin-key.pem")); err != nil {
		return fmt.Errorf("init: %w", err)
	}
	if err := writeNew(in("policy.toml"), fmt.Sprintf(policyText, domain)); err != nil {
		return err
	}
	if c.Bool("node-ca") {
		if err := makeNodeCA(dir, caFor); err != nil {
			return fmt.Errorf("init: %w", err)
		}
	}
	// Last, so that the rest is there once it is.
	if err := writeNew(in("copilot.toml"), text); err != nil {
		return err
	}
	fmt.Printf(`%s is ready.

   copilot serve --config %[1]s                    # or: systemctl enable --now copilot
   copilot keys create --config %[1]s team-a
   copilot enroll --config-dir %[2]s worker-7      # a node needs worker-7.pem, worker-7-key.pem and %[3]s

By %[4]s, nodes may decrypt, CI may encrypt, and root on this machine may do both, with every KEK.
Keep %[5]s away from this machine where you can: it can issue certificates for nodes.
`, in("copilot.toml"), dir, in(pki.CertFile), in("policy.toml"), in(pki.KeyFile))
	if c.Bool("tpm") {
		fmt.Println("The TPM has sealed the master key: give the service access to it, as docs/kms.md shows, and keep a copy\n(copilot master move --to-file): a TPM that is cleared takes the master key with it.")
	}
	return nil
}

// existingCA returns the CA in dir, from an earlier installation or a backup, or nil if
// there is none. Its trust domain must be domain, unless that is empty.
func existingCA(dir, domain string) (*pki.CA, error) {
	found := make(map[string]bool)
	for _, name := range []string{pki.CertFile, pki.KeyFile} {
		_, err := os.Lstat(filepath.Join(dir, name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		found[name] = err == nil
	}
	switch {
	case !found[pki.CertFile] && !found[pki.KeyFile]:
		return nil, nil
	case !found[pki.KeyFile]:
		return nil, fmt.Errorf("%s exists without its key: put %s beside it to use this CA, or move it away to create a new one", filepath.Join(dir, pki.CertFile), pki.KeyFile)
	case !found[pki.CertFile]:
		return nil, fmt.Errorf("%s exists without its certificate: put %s beside it to use this CA, or move it away to create a new one", filepath.Join(dir, pki.KeyFile), pki.CertFile)
	}
	ca, err := pki.Load(dir)
	if err != nil {
		return nil, err
	}
	if ca.TrustDomain() == "" {
		return nil, fmt.Errorf("the CA in %s has no trust domain: it was not made by copilot init", dir)
	}
	if domain != "" && ca.TrustDomain() != domain {
		return nil, fmt.Errorf("the CA in %s is for trust domain %q, and --trust-domain is %q", dir, ca.TrustDomain(), domain)
	}
	fmt.Printf("using the CA in %s, for trust domain %s\n", dir, ca.TrustDomain())
	return ca, nil
}

// serviceUser is the user that the package creates.
const serviceUser = "copilot"

// makeStore creates the server's store for the server's user, if root runs this and there
// is such a user.
func makeStore(store string) error {
	uid, gid, ok, err := owner(serviceUser)
	if err != nil || !ok {
		return err
	}
	if err := os.Mkdir(store, 0o700); errors.Is(err, fs.ErrExist) {
		return nil
	} else if err != nil {
		return err
	}
	return os.Lchown(store, uid, gid)
}

// masterText returns what copilot.toml says of a master key that is not in a file, or "".
func masterText(c *cli.Command) (string, error) {
	file, tpm, pcrs := c.String("kms"), c.Bool("tpm"), c.String("tpm-pcrs")
	switch {
	case file != "" && tpm:
		return "", exit.Usagef("init: --kms and --tpm are mutually exclusive")
	case pcrs != "" && !tpm:
		return "", exit.Usagef("init: --tpm-pcrs needs --tpm")
	case file != "":
		b, err := regular.ReadText(file, regular.MaxConfig)
		return "\n" + string(b), err
	case !tpm:
		return "", nil
	}
	host, err := os.Hostname()
	text := "\n[backends.tpm]\ntype = \"tpm\"\n"
	if pcrs != "" {
		text += fmt.Sprintf("pcrs = %q\n", pcrs)
	}
	return text + fmt.Sprintf("\n[master-key]\nbackend = \"tpm\"\npath = %q\n", host), err
}

// makeWrapped makes a store whose master key is where the configuration says.
func makeWrapped(ctx context.Context, dir, config string) error {
	conf := server.Config{KMS: kmsTypes()}
	if err := tomlfile.Decode("copilot.toml, with --kms", []byte(config), &conf); err != nil {
		return exit.UsageError(err)
	}
	if conf.Wrapping() == nil {
		return exit.Usagef("--kms: [master-key] is missing")
	}
	file := filepath.Join(dir, "keks.db")
	_, err := os.Stat(file)
	if err := server.MakeStore(ctx, conf); err != nil {
		return err
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err // it is there, and whose it is
	}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	return giveToService(f)
}

// giveToService gives a file to the server's user, if there is one.
func giveToService(f *os.File) error {
	uid, gid, ok, err := owner(serviceUser)
	if err != nil || !ok {
		return err
	}
	return f.Chown(uid, gid)
}

// owner returns a user's IDs. It reports false if there is no such user, or if only root
// could give it a file.
func owner(name string) (uid, gid int, ok bool, err error) {
	u, err := user.Lookup(name)
	if err != nil || os.Geteuid() != 0 {
		return 0, 0, false, nil
	}
	if uid, err = strconv.Atoi(u.Uid); err != nil {
		return 0, 0, false, err
	}
	gid, err = strconv.Atoi(u.Gid)
	return uid, gid, err == nil, err
}

// checkHosts rejects names that can't be in a certificate.
func checkHosts(hosts []string) error {
	for _, h := range hosts {
		if net.ParseIP(h) == nil && !validHost.MatchString(h) {
			return fmt.Errorf("--host %q is neither an address nor a name in ASCII", h)
		}
	}
	return nil
}

var validHost = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?$`)

const configText = `# copilot's configuration. See docs/copilot.md.
dir = %q
listen = ["unix:///run/copilot/copilot.sock", "0.0.0.0:%d"]
tls-cert = "%[3]s/server.pem"
tls-key = "%[3]s/server-key.pem"
tls-client-ca = "%[3]s/ca.pem"
policy = "%[3]s/policy.toml"
`

const policyText = `# Who may do what with which KEK. What no rule allows is denied.
# Test it: copilot policy check IDENTITY KEK ACTION

# Nodes decrypt, and may export KEKs.
[[rule]]
identities = ["spiffe://%[1]s/node/*"]
keks = ["**"]
actions = ["unwrap", "export"]

# CI encrypts: copilot wraps, and CI never gets a KEK.
[[rule]]
identities = ["spiffe://%[1]s/ci/*"]
keks = ["**"]
actions = ["wrap"]

[[rule]]
identities = ["spiffe://%[1]s/admin"]
keks = ["**"]
actions = ["admin"]

# Root on this machine.
[[rule]]
identities = ["uid:0"]
keks = ["**"]
actions = ["wrap", "unwrap", "export"]
`

func writeNew(name, text string) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Sync(), f.Close())
}
