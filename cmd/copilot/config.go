package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/internal/commandline"
	"github.com/ctrlplane/pilot/internal/configfile"
	"github.com/ctrlplane/pilot/internal/exit"
)

// defaultConfigFile is read if it exists. One that is named must exist.
var defaultConfigFile = configfile.Default("copilot", "copilot.toml")

// configFlags are the flags of each command that needs the configuration.
func configFlags(more ...cli.Flag) []cli.Flag {
	return append([]cli.Flag{
		&cli.StringFlag{Name: "config", Usage: "`FILE` with the configuration (default: " + defaultConfigFile + " if it exists)", Sources: cli.EnvVars("COPILOT_CONFIG")},
		&cli.StringFlag{Name: "dir", Usage: "`DIRECTORY` of the store", DefaultText: defaultDir, Sources: cli.EnvVars("COPILOT_DIR")},
		&cli.StringFlag{Name: "database", Usage: "PostgreSQL `URL` to keep KEKs in, instead of a file in --dir", Sources: cli.EnvVars("COPILOT_DATABASE")},
		&cli.StringFlag{Name: "audit-log", Usage: "`FILE` to write the audit log to, - for standard output, or database (default: the database if there is one, else audit.log in --dir)"},
		&cli.StringFlag{Name: "policy", Usage: "`FILE` that says who may do what with which KEK"},
	}, more...)
}

const (
	defaultDir    = "/var/lib/copilot"
	defaultListen = "unix:///run/copilot/copilot.sock"
)

// configuration returns the settings of flags, else of the file, else the defaults.
func configuration(c *cli.Command) (server.Config, error) {
	conf := server.Config{Dir: defaultDir, KMS: kmsTypes()}
	name := c.String("config")
	required := name != ""
	if !required {
		name = defaultConfigFile
	}
	if err := conf.ReadConfig(name); errors.Is(err, fs.ErrNotExist) && !required {
		// Not required.
	} else if err != nil {
		return conf, exit.UsageError(err)
	}
	for name, to := range map[string]*string{
		"dir": &conf.Dir, "database": &conf.Database, "audit-log": &conf.AuditLog, "policy": &conf.Policy,
		"tls-cert": &conf.TLSCert, "tls-key": &conf.TLSKey, "tls-client-ca": &conf.TLSClientCA, "metrics-listen": &conf.MetricsListen,
	} {
		if c.IsSet(name) {
			*to = c.String(name)
		}
	}
	if c.IsSet("listen") {
		conf.Listen = c.StringSlice("listen")
	}
	if c.IsSet("insecure-loopback") {
		conf.InsecureLoopback = c.Bool("insecure-loopback")
	}
	return conf, nil
}

// openKeys opens the KEKs that the command's flags name. Only commands that create KEKs
// create a store for them.
func openKeys(ctx context.Context, c *cli.Command) (server.Keys, error) {
	if c.IsSet("server") {
		return remoteKeys(c)
	}
	if runtime.GOOS != "linux" {
		return nil, exit.Usagef("stores are opened on Linux only: name the broker with --server https://HOST:PORT or COPILOT_SERVER")
	}
	conf, err := configuration(c)
	if err != nil {
		return nil, err
	}
	open := server.OpenExistingKeys
	if c.Name == "create" || c.Name == "import" {
		open = server.OpenKeys
	}
	keys, err := open(ctx, conf)
	if errors.Is(err, keystore.ErrNoStore) {
		return nil, err
	}
	if errors.Is(err, context.Canceled) {
		return nil, errors.New("stopped")
	}
	if err != nil {
		return nil, fmt.Errorf("open the KEKs: %w", asOwner(err))
	}
	if made := keys.Created(); made != "" {
		fmt.Fprintf(os.Stderr, "copilot: %s\n", made)
	}
	return keys, nil
}

// asOwner adds to an error which user to run the command as, if this one has no access
// to the store.
func asOwner(err error) error {
	if !errors.Is(err, fs.ErrPermission) || os.Geteuid() == 0 {
		return err
	}
	return fmt.Errorf("%w: run this as root, or as the user that copilot runs as (sudo -u copilot copilot …)", err)
}

// until returns the time from now until that of a flag.
func until(c *cli.Command, name string) (time.Duration, error) {
	d, err := c.Generic(name).(*commandline.When).Until(time.Now())
	if err != nil {
		return 0, exit.Usagef("--%s: %w", name, err)
	}
	return d, nil
}
