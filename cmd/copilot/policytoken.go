package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/copilot/policy"
	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/copilot/server/caller"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/regular"
)

// principal returns who "policy check" is about, and the arguments after the identity.
// The identity is "" if none is given.
func principal(c *cli.Command, conf server.Config, now time.Time) (who policy.Principal, args []string, err error) {
	args = c.Args().Slice()
	if c.String("token") != "" {
		if c.IsSet("claim") {
			return who, nil, exit.Usagef("policy check: --token and --claim are mutually exclusive: a token has its own claims")
		}
		who, err = tokenPrincipal(c.String("token"), conf, now)
		return who, args, err
	}
	if len(args) == 0 {
		if c.IsSet("claim") {
			return who, nil, exit.Usagef("policy check: --claim is for a token's identity: use it with ISSUER:SUBJECT KEK ACTION")
		}
		return who, nil, nil
	}
	if who.Identity, err = policy.Canonical(args[0], conf.IssuerNames()); err != nil {
		return who, nil, exit.Usagef("policy check: %w", err)
	}
	who.Claims, err = claimsOf(c.StringSlice("claim"))
	if _, ok := conf.Issuers[strings.SplitN(who.Identity, ":", 2)[0]]; err == nil && who.Claims != nil && !ok {
		err = exit.Usagef("policy check: %q is not the identity of a token, and only tokens have claims", who.Identity)
	}
	return who, args[1:], err
}

// claimsOf reads claims, each NAME=VALUE. It returns nil if there are none.
func claimsOf(list []string) (claims policy.Claims, err error) {
	for _, s := range list {
		name, value, ok := strings.Cut(s, "=")
		if !ok || name == "" {
			return nil, exit.Usagef("policy check: --claim %q is not NAME=VALUE", s)
		}
		if claims == nil {
			claims = make(policy.Claims)
		}
		claims[name] = append(claims[name], value)
	}
	return claims, nil
}

// tokenPrincipal returns the principal of the token in a file. It warns about what the
// broker refuses it for, except a wrong audience, which is an error: another token of the job
// would have it too.
func tokenPrincipal(file string, conf server.Config, now time.Time) (who policy.Principal, err error) {
	var b []byte
	if file == "-" {
		b, err = io.ReadAll(io.LimitReader(os.Stdin, caller.MaxToken+1))
	} else {
		b, err = regular.Read(file, caller.MaxToken)
	}
	if err != nil {
		return who, exit.Usagef("policy check: --token: %w", err)
	}
	who, issuer, err := caller.Inspect(strings.TrimSpace(string(b)), conf.Issuers)
	if err != nil {
		return who, exit.Usagef("policy check: --token: %w", err)
	}
	if strings.ContainsFunc(who.Identity, func(r rune) bool { return !strconv.IsPrint(r) }) {
		return who, exit.Usagef("policy check: --token: the subject has characters that can't be printed: %q", who.Identity)
	}
	fmt.Fprintln(os.Stderr, "copilot: warning: the token's signature was not checked")
	if audience := who.Claims["aud"]; !slices.Contains(audience, issuer.Audience) {
		return who, exit.DeniedError(fmt.Errorf("denied: the token is for the audience %q, and the issuer's audience in the configuration is %q", audience, issuer.Audience))
	}
	for _, exp := range who.Claims["exp"] {
		if seconds, err := strconv.ParseFloat(exp, 64); err == nil && now.After(time.Unix(int64(seconds), 0)) {
			fmt.Fprintf(os.Stderr, "copilot: warning: the token expired at %s: the broker refuses it\n", time.Unix(int64(seconds), 0).UTC().Format(time.RFC3339))
		}
	}
	return who, nil
}

// printGrants prints which rules are for a token. If none allows it anything, the status
// is that of a denial.
func printGrants(c *cli.Command, p *policy.Policy, who policy.Principal, now time.Time) error {
	grants := p.Grants(who, now)
	if c.Bool("json") {
		if err := printJSON(map[string]any{"identity": who.Identity, "claims": who.Claims, "rules": append([]policy.Grant{}, grants...)}); err != nil {
			return err
		}
	}
	for _, g := range grants {
		if c.Bool("json") {
			break
		}
		verb := "allows"
		if g.Deny {
			verb = "denies"
		}
		actions := make([]string, len(g.Actions))
		for i, a := range g.Actions {
			actions[i] = string(a)
		}
		line := fmt.Sprintf("rule %d %s %s with %s", g.Rule, verb, strings.Join(actions, ", "), strings.Join(g.KEKs, ", "))
		if len(g.Workloads) > 0 {
			line += ", for the workloads " + strings.Join(g.Workloads, ", ")
			if g.Labels != "" {
				line += " with the labels " + g.Labels
			}
		}
		if len(g.Unmet) > 0 {
			line = fmt.Sprintf("rule %d does not count: %s", g.Rule, strings.Join(g.Unmet, "; "))
		}
		fmt.Println(line)
	}
	if !p.Names(who, now) {
		return exit.DeniedError(fmt.Errorf("denied: no rule allows %s anything", who.Identity))
	}
	return nil
}
