package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/http"
	"sync"

	"github.com/containerd/containerd/v2/cmd/ctr/commands"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/containerd/v2/pkg/httpdbg"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/image/registry"
	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/exit"
)

// registryHosts returns the registry hosts that ctr's flags configure. ctr's own
// resolver can't list tags and does not show which hosts it asks.
func registryHosts(ctx context.Context, cmd *cli.Command) (docker.RegistryHosts, error) {
	options := config.HostOptions{Credentials: func(host string) (string, string, error) {
		return storedCredentials(ctx, host)
	}}
	if namesUser(cmd) {
		user, err := commands.NewStaticCredentials(ctx, cmd, "")
		if err != nil {
			return nil, err
		}
		options.Credentials = func(host string) (string, string, error) {
			c, err := user.GetCredentials(ctx, "", host)
			return c.Username, c.Secret, err
		}
	}
	if cmd.Bool("plain-http") {
		options.DefaultScheme = "http"
	}
	var err error
	if options.DefaultTLS, err = registryTLS(cmd); err != nil {
		return nil, err
	}
	if dir := cmd.String("hosts-dir"); dir != "" {
		options.HostDir = config.HostDirFromRoot(dir)
	}
	options.UpdateClient = func(client *http.Client) error {
		if cmd.Bool("http-dump") {
			httpdbg.DumpRequests(ctx, client, nil)
		}
		if cmd.Bool("http-trace") {
			httpdbg.DumpTraces(ctx, client)
		}
		return nil
	}
	hosts := config.ConfigureHosts(ctx, options)

	// Each call makes connections and gets tokens of its own.
	hosts = registry.Guarded(hosts)
	var mu sync.Mutex
	first := ""
	known := make(map[string][]docker.RegistryHost)
	return func(host string) ([]docker.RegistryHost, error) {
		mu.Lock()
		defer mu.Unlock()
		if list, ok := known[host]; ok {
			return list, nil
		}
		// Not all names are known from the start: those of --keys-from may be containerd's.
		if first == "" {
			first = host
		} else if namesUser(cmd) {
			return nil, errRegistries(first, host)
		}
		list, err := hosts(host)
		if err == nil {
			known[host] = list
		}
		return list, err
	}, nil
}

// registryTLS returns the TLS configuration of the flags, or nil if there is none.
func registryTLS(cmd *cli.Command) (*tls.Config, error) {
	ca, cert, key := cmd.String("tlscacert"), cmd.String("tlscert"), cmd.String("tlskey")
	if !cmd.Bool("skip-verify") && ca == "" && cert == "" && key == "" {
		return nil, nil
	}
	conf := &tls.Config{InsecureSkipVerify: cmd.Bool("skip-verify")}
	if ca != "" {
		var err error
		if conf.RootCAs, err = certfile.Pool(ca); err != nil {
			return nil, fmt.Errorf("--tlscacert: %w", err)
		}
	}
	if (cert == "") != (key == "") {
		return nil, exit.Usagef("--tlscert and --tlskey must be used together")
	}
	if cert != "" {
		pair, err := certfile.KeyPair(cert, key)
		if err != nil {
			return nil, fmt.Errorf("--tlscert: %w", err)
		}
		conf.Certificates = []tls.Certificate{pair}
	}
	return conf, nil
}
