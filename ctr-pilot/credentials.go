package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/cmd/ctr/commands"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/image/transport"
	"github.com/ctrlplane/pilot/internal/dockerconfig"
	"github.com/ctrlplane/pilot/internal/exit"
)

const credentialsHelp = `
Without --user, the credentials are those of "docker login", of its credential
helpers, or, if Docker has no configuration, of "podman login".
`

// registryFlags are ctr's flags for registries, and ours.
func registryFlags() []cli.Flag {
	return append(slices.Clone(commands.RegistryFlags), passwordFlag())
}

// checkRegistryFlags returns an error if a flag for registries is set and none of the
// arguments and names is of an image in one. also says what the flags are for.
func checkRegistryFlags(cmd *cli.Command, also string, names ...transport.Name) error {
	for _, name := range cmd.Args().Slice() {
		if n, err := transport.Parse(name); err == nil {
			names = append(names, n)
		}
	}
	if slices.ContainsFunc(names, func(n transport.Name) bool { return n.Transport == transport.Registry }) {
		return nil
	}
	for _, f := range registryFlags() {
		if name := f.Names()[0]; cmd.IsSet(name) {
			return exit.Usagef("--%s is for %s", name, also)
		}
	}
	return nil
}

func passwordFlag() cli.Flag {
	return &cli.BoolFlag{Name: "password-stdin", Usage: "read the password of --user from standard input"}
}

// maxPassword bounds a password on standard input, in bytes.
const maxPassword = 64 << 10

// readPassword puts the password on standard input into --user, where ctr's code
// looks for it, if --password-stdin is given.
func readPassword(cmd *cli.Command) error {
	if !cmd.Bool("password-stdin") {
		return nil
	}
	user := cmd.String("user")
	if user == "" || strings.Contains(user, ":") {
		return exit.Usagef("--password-stdin needs --user NAME, without a password")
	}
	b, err := io.ReadAll(io.LimitReader(os.Stdin, maxPassword+1))
	if err != nil {
		return fmt.Errorf("--password-stdin: %w", err)
	}
	password := strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r")
	if password == "" || len(b) > maxPassword {
		return exit.Usagef("--password-stdin: standard input has to hold a password of 1 to %d bytes", maxPassword)
	}
	return cmd.Set("user", user+":"+password)
}

// namesUser reports whether the flags have credentials for registries.
func namesUser(cmd *cli.Command) bool {
	return cmd.String("user") != "" || cmd.String("refresh") != ""
}

// storedCredentials returns the credentials that Docker's or Podman's configuration
// has for a registry, as [dockerconfig.Credentials] does.
func storedCredentials(ctx context.Context, host string) (user, secret string, err error) {
	user, secret, err = dockerconfig.Credentials(ctx, host)
	if err != nil {
		err = fmt.Errorf("the credentials that Docker or Podman has for %s (--user does without them): %w", host, err)
	}
	return user, secret, err
}

// withStoredCredentials makes one of ctr's own commands, whose first argument is an
// image of a registry, use stored credentials. ctr sends its credentials to every host
// that it asks, so they are used only if there is one.
func withStoredCredentials(c *cli.Command) {
	c.Flags = append(c.Flags, passwordFlag())
	c.Description += credentialsHelp
	stock := c.Action
	c.Action = func(ctx context.Context, cmd *cli.Command) error {
		if err := readPassword(cmd); err != nil {
			return err
		}
		if err := setStoredCredentials(ctx, cmd); err != nil {
			return err
		}
		return stock(ctx, cmd)
	}
}

func setStoredCredentials(ctx context.Context, cmd *cli.Command) error {
	if namesUser(cmd) || cmd.NArg() == 0 {
		return nil
	}
	ref, err := reference.Parse(cmd.Args().First())
	if err != nil {
		return nil // the command's own error is clearer
	}
	user, secret, err := storedCredentials(ctx, ref.Hostname())
	if err != nil || secret == "" {
		return err
	}
	others, err := otherHosts(ctx, cmd, ref.Hostname())
	if err != nil {
		return err
	}
	if len(others) > 0 {
		fmt.Fprintf(os.Stderr, "ctr-pilot: warning: the stored credentials for %s are not used, since --hosts-dir leads to %s too: give --user\n", ref.Hostname(), strings.Join(others, ", "))
		return nil
	}
	if user == "" {
		return cmd.Set("refresh", secret)
	}
	if strings.Contains(user, ":") {
		return errors.New("the stored user name has a colon, so it can't be passed on: give --user")
	}
	return cmd.Set("user", user+":"+secret)
}

// otherHosts returns the hosts other than the registry's own that requests for it go to.
func otherHosts(ctx context.Context, cmd *cli.Command, registry string) ([]string, error) {
	hosts, err := registryHosts(ctx, cmd)
	if err != nil {
		return nil, err
	}
	list, err := hosts(registry)
	if err != nil {
		return nil, err
	}
	own, err := docker.DefaultHost(registry)
	if err != nil {
		return nil, err
	}
	var others []string
	for _, h := range list {
		if h.Host != registry && h.Host != own {
			others = append(others, h.Host)
		}
	}
	return others, nil
}
