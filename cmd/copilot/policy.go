package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/policy"
	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/copilot/server/authorization"
	"github.com/ctrlplane/pilot/internal/commandline"
	"github.com/ctrlplane/pilot/internal/exit"
)

var policyCommand = &cli.Command{
	Name:  "policy",
	Usage: "check the policy",
	Description: `The policy is a file that says who may do what with which KEK.

Example:
   copilot policy check spiffe://example.com/node/worker-7 team-a unwrap`,
	Commands: []*cli.Command{{
		Name: "check", Usage: "show whether an identity may do something with a KEK, and why", ArgsUsage: "[IDENTITY [KEK ACTION]]",
		Description: `Identities look as in the audit log: spiffe://DOMAIN/PATH, dns:NAME or cn:NAME of
a certificate, uid:NUMBER over a unix socket, ISSUER:SUBJECT of a token. Actions
are wrap, unwrap, export, public and admin. With IDENTITY alone, it lists the rules for
it. Without arguments, it checks the file only, and warns of rules by which others
than expected may get in.
Whether the KEK is disabled or revoked is asked of the configured store, or of
--server. The exit status is 0 if it is allowed, and 3 if it is denied.

With --workload it is for a workload that the identity vouches for, as a node does
before it starts a container, whose pod has the labels of --label and no others.

With --token FILE the identity and its claims are those of a token, and IDENTITY
is left out. The token's signature is not checked.

Examples:
   copilot policy check spiffe://example.com/node/worker-7 team-a unwrap
   copilot policy check --workload prod/web --label tier=gold \
      spiffe://example.com/node/worker-7 team-a unwrap
   copilot policy check --claim repository_id=123456 --claim ref=refs/heads/main \
      github:repo:acme/app:ref:refs/heads/main team-a wrap
   copilot policy check --token token.jwt team-a wrap`,
		Flags: configFlags(append(serverFlags(),
			&cli.StringSliceFlag{Name: "claim", Usage: "claim `NAME=VALUE` of the identity's token; several, if repeated"},
			&cli.StringFlag{Name: "token", Usage: "`FILE` with a token (JWT), or - for standard input, instead of IDENTITY"},
			&cli.StringFlag{Name: "workload", Usage: "`NAMESPACE/SERVICEACCOUNT` that the identity, a node, vouches for"},
			&cli.StringSliceFlag{Name: "label", Usage: "label `KEY=VALUE` of the workload's pod; several, if repeated"},
			&cli.GenericFlag{Name: "at", Usage: "`TIME` to check for, as in 2030-01-01, 2030-01-02T03:04:05Z or 90d", Value: &commandline.When{}, DefaultText: "now"},
			jsonFlag(),
		)...),
		Action:                    checkPolicy,
		DisableSliceFlagSeparator: true,
	}},
}

func checkPolicy(ctx context.Context, c *cli.Command) error {
	conf, err := configuration(c)
	if err != nil {
		return err
	}
	if conf.Policy == "" {
		return exit.Usagef("policy check: policy is not set: use --policy, or set it in the configuration")
	}
	p, err := policy.Load(conf.Policy, conf.PolicyIssuers())
	if err != nil {
		return exit.UsageError(err)
	}
	now := c.Generic("at").(*commandline.When).At(time.Now())
	who, args, err := principal(c, conf, now)
	if err != nil {
		return err
	}
	if c.IsSet("workload") {
		if err := policy.CheckWorkload(c.String("workload")); err != nil {
			return exit.Usagef("policy check: --workload: %w", err)
		}
		if len(args) == 0 {
			return exit.Usagef("policy check: --workload is for one KEK: use it with IDENTITY KEK unwrap")
		}
	}
	labels, err := labelsOf(c)
	if err != nil {
		return err
	}
	switch {
	case len(args) == 0 && who.Identity != "":
		return printGrants(c, p, who, now)
	case len(args) == 0:
		return printUsable(c, conf.Policy, p)
	case len(args) != 2:
		return exit.Usagef("policy check takes an identity (or --token), a KEK and an action, and got %d arguments", c.NArg())
	}
	identity, kek, action := who.Identity, args[0], policy.Action(args[1])
	if who.Workload, who.Labels = c.String("workload"), labels; who.Workload != "" && action != policy.Unwrap {
		return exit.Usagef("policy check: --workload is for unwrap: other actions are the node's own")
	}
	if !slices.Contains(policy.Actions, action) {
		return exit.Usagef("policy check: unknown action %q: use wrap, unwrap, export, public or admin", action)
	}
	v := p.Decide(who, kek, action, now)
	unknown := ""
	if v.Allowed {
		reason, err := refusedByKEK(ctx, c, kek, identity, &unknown)
		if err != nil {
			return err
		}
		if reason != "" {
			v.Allowed = false
			v.Reason += ", but " + reason
		}
	}
	if !v.Allowed && who.Workload == "" {
		// Identities that may export the KEK can wrap and unwrap without the broker.
		if (action == policy.Wrap || action == policy.Unwrap) && p.Decide(who, kek, policy.Export, now).Allowed {
			reason, err := refusedByKEK(ctx, c, kek, identity, &unknown)
			if err != nil {
				return err
			}
			if reason == "" {
				v.Reason += fmt.Sprintf(": but it may export the KEK, and so can %s with it", action)
			}
		}
	}
	if c.Bool("json") {
		if err := printJSON(policyVerdict{v.Allowed, v.Reason, identity, kek, action, now.UTC(), unknown, who.Claims, who.Workload, who.Labels}); err != nil {
			return err
		}
	}
	if !v.Allowed {
		return exit.DeniedError(fmt.Errorf("denied: %s", v.Reason))
	}
	if !c.Bool("json") {
		fmt.Printf("allowed: %s\n", v.Reason)
	}
	return nil
}

// policyVerdict is what "policy check --json" prints.
type policyVerdict struct {
	Allowed  bool          `json:"allowed"`
	Reason   string        `json:"reason"`
	Identity string        `json:"identity"`
	KEK      string        `json:"kek"`
	Action   policy.Action `json:"action"`
	At       time.Time     `json:"at"`
	// Unknown is why revoked and disabled KEKs are not taken into account, if so.
	Unknown string `json:"unknown,omitempty"`
	// Claims are those of the token, or of --claim.
	Claims policy.Claims `json:"claims,omitempty"`
	// Workload is that of --workload.
	Workload string `json:"workload,omitempty"`
	// Labels are those of --label.
	Labels map[string]string `json:"labels,omitempty"`
}

// labelsOf returns the labels of the pod of --workload, or nil without that.
func labelsOf(c *cli.Command) (map[string]string, error) {
	if !c.IsSet("workload") {
		if c.IsSet("label") {
			return nil, exit.Usagef("policy check: --label is for a workload's pod: use it with --workload")
		}
		return nil, nil
	}
	labels := map[string]string{}
	for _, s := range c.StringSlice("label") {
		key, value, ok := strings.Cut(s, "=")
		if !ok {
			return nil, exit.Usagef("policy check: --label %q is not KEY=VALUE", s)
		}
		if _, twice := labels[key]; twice {
			return nil, exit.Usagef("policy check: --label: duplicate key %q", key)
		}
		labels[key] = value
	}
	return labels, nil
}

// printUsable prints that a policy can be used, and warnings.
func printUsable(c *cli.Command, name string, p *policy.Policy) error {
	if c.Bool("json") {
		return printJSON(map[string]any{"policy": name, "usable": true, "warnings": append([]string{}, p.Warnings...)})
	}
	for _, warning := range p.Warnings {
		fmt.Fprintf(os.Stderr, "copilot: warning: %s\n", warning)
	}
	fmt.Printf("%s can be used\n", name)
	return nil
}

// refusedByKEK returns why a KEK is denied to an identity that the policy allows, or "".
// It sets unknown if the store can't be read.
func refusedByKEK(ctx context.Context, c *cli.Command, id, identity string, unknown *string) (string, error) {
	keys, err := openKeys(ctx, c)
	if err != nil {
		*unknown = err.Error()
		fmt.Fprintf(os.Stderr, "copilot: warning: can't tell whether the KEK is revoked or disabled: %s\n", err)
		return "", nil
	}
	defer keys.Close()
	info, err := keys.Get(ctx, id)
	if e := new(server.StatusError); errors.As(err, &e) && e.Denied() {
		return "of the KEK: " + err.Error(), nil
	}
	switch {
	case err != nil:
		return "", fmt.Errorf("policy check: %w", err)
	case authorization.Revocation(info.Revoked, identity) != "":
		return "the KEK was revoked for " + authorization.Revocation(info.Revoked, identity), nil
	case info.Disabled:
		return "the KEK is disabled", nil
	}
	for _, v := range info.Versions {
		if v.Version == info.Version && v.State != keystore.Enabled {
			return fmt.Sprintf("its current version, %d, is %s", v.Version, v.State), nil
		}
	}
	return "", nil
}
