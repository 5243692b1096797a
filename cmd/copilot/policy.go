package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/ctrlplane/pilot/copilot"
	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/policy"
)

var policyCommand = &cli.Command{
	Name:  "policy",
	Usage: "check the policy",
	Subcommands: []*cli.Command{{
		Name: "check", Usage: "say whether an identity may do something with a KEK, and why", ArgsUsage: "[IDENTITY KEK ACTION]",
		Description: `Identities look as in the audit log: spiffe://DOMAIN/PATH, dns:NAME or cn:NAME of
a certificate, uid:NUMBER over a unix socket, ISSUER:SUBJECT of a token. Actions
are wrap, unwrap, export and admin. Without arguments, it checks the file only.
The exit status is 0 if it is allowed.

Example:
   copilot policy check spiffe://example.com/node/worker-7 team-a unwrap`,
		Flags: configFlags(
			&cli.TimestampFlag{Name: "at", Usage: "`TIME` to check for, as in 2026-01-02T03:04:05Z (default: now)", Layout: time.RFC3339},
		),
		Action: checkPolicy,
	}},
}

func checkPolicy(c *cli.Context) error {
	conf, err := configuration(c)
	if err != nil {
		return err
	}
	if conf.Policy == "" {
		return errors.New("policy check: there is none: name its file with --policy, or in the configuration")
	}
	p, err := policy.Load(conf.Policy, conf.IssuerNames())
	if err != nil {
		return err
	}
	if c.NArg() == 0 {
		fmt.Printf("%s can be used\n", conf.Policy)
		return nil
	}
	if c.NArg() != 3 {
		return fmt.Errorf("policy check takes an identity, a KEK and an action, after the flags, and got %d arguments", c.NArg())
	}
	identity, kek, action := c.Args().Get(0), c.Args().Get(1), policy.Action(c.Args().Get(2))
	if !slices.Contains(policy.Actions, action) {
		return fmt.Errorf("policy check: %q is no action: there are wrap, unwrap, export and admin", action)
	}
	if identity, err = policy.Canonical(identity, conf.IssuerNames()); err != nil {
		return fmt.Errorf("policy check: %w", err)
	}
	now := time.Now()
	if at := c.Timestamp("at"); at != nil {
		now = *at
	}
	v := p.Decide(identity, kek, action, now)
	if v.Allowed {
		if reason := refusedByKEK(c, kek, identity); reason != "" {
			v.Allowed = false
			v.Reason += ", but " + reason
		}
	}
	if !v.Allowed {
		// With the KEK itself, it needs nobody to wrap and unwrap.
		if (action == policy.Wrap || action == policy.Unwrap) && p.Decide(identity, kek, policy.Export, now).Allowed && refusedByKEK(c, kek, identity) == "" {
			v.Reason += fmt.Sprintf(": but it may export the KEK, and so can %s with it", action)
		}
		return fmt.Errorf("denied: %s", v.Reason)
	}
	fmt.Printf("allowed: %s\n", v.Reason)
	return nil
}

// refusedByKEK says why a KEK is not given to an identity that the policy
// allows to have it, or nothing.
func refusedByKEK(c *cli.Context, id, identity string) string {
	keys, err := openKeys(c)
	if err != nil {
		fmt.Fprintf(os.Stderr, "copilot: warning: what was revoked and disabled is not known here: %s\n", err)
		return ""
	}
	defer keys.Close()
	info, err := keys.Get(id)
	switch {
	case err != nil:
		return "of the KEK: " + err.Error()
	case copilot.IsRevoked(info.Revoked, identity):
		return "the KEK was revoked for " + identity
	case info.Disabled:
		return "the KEK is disabled"
	}
	for _, v := range info.Versions {
		if v.Version == info.Version && v.State != keystore.Enabled {
			return fmt.Sprintf("its current version, %d, is %s", v.Version, v.State)
		}
	}
	return ""
}
