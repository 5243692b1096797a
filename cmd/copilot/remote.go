package main

import (
	"crypto/tls"
	"net/http"
	"net/url"

	"github.com/urfave/cli/v2"

	copilot "github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/exit"
)

// serverFlags are those of commands that a copilot elsewhere can carry out.
func serverFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "server", Usage: "https://HOST:PORT of a copilot elsewhere, whose policy lets --cert do this", EnvVars: []string{"COPILOT_SERVER"}},
		&cli.StringFlag{Name: "ca", Usage: "CA of --server's certificate, `FILE` in PEM (default: the system's)", EnvVars: []string{"COPILOT_CA"}},
		&cli.StringFlag{Name: "cert", Usage: "client certificate to show --server, `FILE` in PEM", EnvVars: []string{"COPILOT_CERT"}},
		&cli.StringFlag{Name: "key", Usage: "private key of --cert, `FILE` in PEM", EnvVars: []string{"COPILOT_KEY"}},
	}
}

func remoteKeys(c *cli.Context) (copilot.Keys, error) {
	server := c.String("server")
	if u, err := url.Parse(server); err != nil || u.Scheme != "https" || u.Host == "" || u.Path != "" && u.Path != "/" {
		return nil, exit.Usagef("--server %s: it is https://HOST:PORT", server)
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
		return nil, exit.Usagef("--server needs --cert and --key, which say who asks")
	}
	pair, err := certfile.KeyPair(c.String("cert"), c.String("key"))
	if err != nil {
		return nil, exit.Usagef("--cert: %w", err)
	}
	conf.Certificates = []tls.Certificate{pair}
	return copilot.RemoteKeys(server, &http.Transport{TLSClientConfig: conf, ForceAttemptHTTP2: true}), nil
}
