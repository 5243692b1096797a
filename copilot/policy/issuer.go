package policy

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Issuers are those whose tokens the broker accepts: their URLs by name.
type Issuers map[string]string

func (i Issuers) names() []string {
	if i == nil {
		return nil
	}
	return append([]string{}, slices.Sorted(maps.Keys(i))...)
}

// forge is an issuer that gives tokens to the CI jobs of everybody's repositories.
type forge struct {
	url string
	// ids and names are the claims that say whose repository a token is for. An id is
	// never given to another one; a name can be, after it was renamed or deleted.
	ids, names []string
	// user is the claim with the name of the user that started a job, who can change it.
	user string
	// subject is what a subject begins with if the repository's path follows.
	subject string
	// causes are the claims that say what of a repository has started a job.
	causes []string
}

// forges are those that everybody can have an account at. The claims are those of
// https://docs.github.com/en/actions/reference/security/oidc and
// https://docs.gitlab.com/ci/secrets/id_token_authentication. GitLab's job_project_… are
// not among them: a merge request from a fork has the project's own.
var forges = []forge{
	{"https://token.actions.githubusercontent.com", []string{"repository_id", "repository_owner_id", "enterprise_id"}, []string{"repository", "repository_owner", "enterprise"}, "actor", "repo:",
		[]string{"ref", "environment", "event_name", "workflow_ref", "job_workflow_ref"}},
	{"https://gitlab.com", []string{"project_id", "namespace_id"}, []string{"project_path", "namespace_path"}, "user_login", "project_path:",
		[]string{"ref", "ref_path", "ref_protected", "environment", "environment_protected", "pipeline_source", "ci_config_ref_uri"}},
}

// forgeAt returns the forge whose tokens have that issuer, or nil.
func forgeAt(url string) *forge {
	for i := range forges {
		if strings.EqualFold(strings.TrimRight(url, "/"), forges[i].url) {
			return &forges[i]
		}
	}
	return nil
}

// restriction is what keeps other people's repositories from matching a rule.
type restriction int

const (
	anybody restriction = iota
	byName
	byID
	notOfForge // no token of the forge matches
)

// restricts returns how a rule's identities that are of the forge, which is configured
// as an issuer of that name, and its claims restrict whose repository it is.
func (f *forge) restricts(issuer, identity string, claims []claim) restriction {
	literal, _, hasStar := strings.Cut(identity, "*")
	subject, ofIssuer := strings.CutPrefix(literal, issuer+":")
	if !ofIssuer && !(hasStar && strings.HasPrefix(issuer+":", literal)) {
		return notOfForge
	}
	best := anybody
	if path, ok := strings.CutPrefix(subject, f.subject); ofIssuer && ok {
		if owner, _, ok := strings.Cut(path, "/"); ok {
			best = byName
			if strings.Contains(owner, "@") { // the owner's id
				best = byID
			}
		}
	}
	for _, c := range claims {
		switch {
		case slices.ContainsFunc(c.patterns, func(p string) bool { return !namesOwner(p) }):
		case slices.Contains(f.ids, c.name):
			best = byID
		case slices.Contains(f.names, c.name):
			best = max(best, byName)
		}
	}
	return best
}

// namesOwner reports whether a pattern of a repository, of an owner or of an id matches
// those of one owner only: it has no star before the first slash.
func namesOwner(pattern string) bool {
	literal, _, hasStar := strings.Cut(pattern, "*")
	return !hasStar || strings.Contains(literal, "/")
}

// canBeEscaped reports whether those that a rule denies can get around it: owners of
// repositories choose the form of subjects, and names change.
func (f *forge) canBeEscaped(issuer, identity string, claims []claim) bool {
	if strings.HasPrefix(identity, issuer+":") && identity != issuer+":**" {
		return true
	}
	return slices.ContainsFunc(claims, func(c claim) bool { return c.name == f.user || slices.Contains(f.names, c.name) })
}

// saysCause reports whether a claim says what may have started a job, not just that
// something has.
func (f *forge) saysCause(c claim) bool {
	return slices.Contains(f.causes, c.name) && !slices.ContainsFunc(c.patterns, func(p string) bool { return strings.Trim(p, "*") == "" })
}

// matchesRefWithAt reports whether a pattern of a file and a ref, such as
// acme/app/**@refs/heads/main, matches refs that have an @ themselves, such as
// refs/heads/x@refs/heads/main.
func matchesRefWithAt(pattern string) bool {
	_, after, ok := strings.Cut(pattern, "**")
	return ok && strings.Contains(after, "@")
}

// checkForges returns an error if the rule lets everybody's repositories in, and warnings
// about what others may match later, or escape.
func (r *rule) checkForges(issuers Issuers) (warnings []string, err error) {
	for name, url := range issuers {
		f := forgeAt(url)
		if f == nil {
			continue
		}
		for _, identity := range r.Identities {
			if identity == name+":*" {
				return nil, fmt.Errorf("%q matches no subject of %s, since * stands for no slash: use \"%s:**\"", identity, url, name)
			}
			ofForge := f.restricts(name, identity, nil) < notOfForge
			if r.Deny {
				if ofForge && f.canBeEscaped(name, identity, r.claims) {
					warnings = append(warnings, fmt.Sprintf("%s: %q is denied by a subject or name, which can be changed to escape the rule: deny \"%s:**\" with claims that are ids, such as %s", r, identity, name, f.ids[0]))
				}
				continue
			}
			for _, action := range []Action{Export, Admin} {
				if ofForge && slices.Contains(r.Actions, action) {
					warnings = append(warnings, fmt.Sprintf("%s: %q lets CI jobs %s KEKs: wrap is enough to encrypt", r, identity, action))
				}
			}
			for _, c := range r.claims {
				if ofForge && slices.Contains(f.causes, c.name) && slices.ContainsFunc(c.patterns, matchesRefWithAt) {
					warnings = append(warnings, fmt.Sprintf("%s: ** before the @ of %s matches any branch whose name ends like the pattern: use *", r, c.name))
				}
			}
			if ofForge && strings.Contains(identity, "*") && !slices.ContainsFunc(r.claims, f.saysCause) {
				warnings = append(warnings, fmt.Sprintf("%s: %q is every branch, pull request and event: add claims such as %s", r, identity, strings.Join(f.causes, ", ")))
			}
			switch f.restricts(name, identity, r.claims) {
			case anybody:
				return nil, fmt.Errorf("%q lets in everybody who has a repository at %s: add claims that say whose it is, such as %s (without a star) or %s (without one before the first slash)",
					identity, url, strings.Join(f.ids, ", "), strings.Join(f.names, ", "))
			case byName:
				warnings = append(warnings, fmt.Sprintf("%s: %q is restricted by names only, which somebody else can register after a rename or deletion: add the claim %s or %s", r, identity, f.ids[0], f.ids[1]))
			}
		}
	}
	slices.Sort(warnings)
	return slices.Compact(warnings), nil
}
