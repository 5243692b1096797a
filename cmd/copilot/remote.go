package main

import (
	"crypto/tls"
	"net/http"
	"net/url"

	"github.com/urfave/cli/v3"

	copilot "github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/exit"
)

// serverFlags are those of commands that a broker on another machine can run.
func serverFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "server", Usage: "`URL` of a broker on another machine, https://HOST:PORT, whose policy allows this for --cert", Sources: cli.EnvVars("COPILOT_SERVER")},
		&cli.StringFlag{Name: "ca", Usage: "CA of --server's certificate, `FILE` in PEM (default: the system's)", Sources: cli.EnvVars("COPILOT_CA")},
		&cli.StringFlag{Name: "cert", Usage: "client certificate to show --server, `FILE` in PEM", Sources: cli.EnvVars("COPILOT_CERT")},
		&cli.StringFlag{Name: "key", Usage: "private key of --cert, `FILE` in PEM", Sources: cli.EnvVars("COPILOT_KEY")},
	}
}

func remoteKeys(c *cli.Command) (copilot.Keys, error) {
	server := c.String("server")
	if u, err := url.Parse(server); err != nil || u.Scheme != "https" || u.Host == "" || u.Path != "" && u.Path != "/" {
		return nil, exit.Usagef("--server %q is not https://HOST:PORT", server)
	}
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if name := c.String("ca"); name != "" {
		pool, err := certfile.Pool(name)
		if err != nil {
			return nil, exit.Usagef("--ca: %w", err)
		}
		conf.RootCAs = pool
	}
	if c.String("cert") == "" || c.String("key") == "" {
		return nil, exit.Usagef("--server needs --cert and --key")
	}
	pair, err := certfile.KeyPair(c.String("cert"), c.String("key"))
	if err != nil {
		return nil, exit.Usagef("--cert: %w", err)
	}
	conf.Certificates = []tls.Certificate{pair}
	return copilot.RemoteKeys(server, &http.Transport{TLSClientConfig: conf, ForceAttemptHTTP2: true}), nil
}
