package policy

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Anonymous is the identity of clients that show none.
const Anonymous = "anonymous"

// identityForms are the identities that there are, for errors.
const identityForms = "identities are spiffe://DOMAIN/PATH, dns:NAME, cn:NAME, uid:NUMBER, ISSUER:SUBJECT and " + Anonymous

// A token of a Kubernetes service account that names the node of its pod has the identity
// ISSUER:system:serviceaccount:NAMESPACE:NAME@node/NODE. Names of service accounts have no @.
const (
	serviceAccount = "system:serviceaccount:"
	onNode         = "@node/"
)

// subdomain matches RFC 1123 subdomains, such as the names of nodes.
var subdomain = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)

// maxSubdomain bounds a subdomain, in bytes.
const maxSubdomain = 253

// TokenIdentity returns the identity of an issuer's token, from its subject and the node
// that it names, or "". Only the node of a Kubernetes service account counts.
func TokenIdentity(issuer, subject, node string) (string, error) {
	identity := issuer + ":" + subject
	if !isServiceAccount(identity) {
		return identity, nil
	}
	if strings.Contains(subject, "@") {
		return "", fmt.Errorf("the subject %.300q is no service account's: it has an @", subject)
	}
	if node != "" {
		identity += onNode + node
	}
	return identity, checkNode(identity)
}

// checkNode checks the node's name in the identity of a service account.
func checkNode(identity string) error {
	account, node, ok := strings.Cut(identity, "@")
	if !ok || !isServiceAccount(account) {
		return nil
	}
	if node, ok = strings.CutPrefix("@"+node, onNode); !ok || len(node) > maxSubdomain || !subdomain.MatchString(node) {
		return fmt.Errorf("%.400q: what follows a service account is %sNAME, with the name of a node", identity, onNode)
	}
	return nil
}

func isServiceAccount(identity string) bool {
	_, subject, _ := strings.Cut(identity, ":")
	return strings.HasPrefix(subject, serviceAccount) && mayBeOfIssuer(identity)
}

// Group returns the identity that a service account has on all nodes, without the node, or
// "" for identities that have none. What names the group names all of its identities.
func Group(identity string) string {
	account, _, ok := strings.Cut(identity, onNode)
	if !ok || !isServiceAccount(account) {
		return ""
	}
	return account
}

// canonicalDNS returns a host name as identities have it: in lower case, and
// without the dot at its end (RFC 4343, RFC 1034 section 3.1).
func canonicalDNS(name string) string {
	return strings.ToLower(strings.TrimSuffix(name, "."))
}

// Canonical returns an identity as the audit log has it. It is an error if no
// client could ever have that identity. A subject of an issuer is taken as it is:
// issuers are the names of those that are configured, or nil where they are not
// known.
func Canonical(identity string, issuers []string) (string, error) {
	kind, rest, ok := strings.Cut(identity, ":")
	switch {
	case identity == Anonymous:
		return identity, nil
	case !ok || rest == "":
		return "", fmt.Errorf("%q is not an identity: %s", identity, identityForms)
	case kind == "spiffe":
		id, err := spiffeid.FromString(identity)
		if err == nil && id.Path() == "" {
			err = errors.New("it has no path, so it is a trust domain's, not a client's")
		}
		if err != nil {
			return "", fmt.Errorf("%q is not a SPIFFE ID: %w", identity, err)
		}
		return id.String(), nil
	case kind == "dns":
		name := canonicalDNS(rest)
		if strings.ContainsAny(name, "*/: ") || slices.Contains(strings.Split(name, "."), "") {
			return "", fmt.Errorf("%q: %q is not a host name", identity, rest)
		}
		return "dns:" + name, nil
	case kind == "cn":
		return identity, nil
	case kind == "uid":
		uid, err := strconv.ParseUint(rest, 10, 32)
		if err != nil {
			return "", fmt.Errorf("%q: %q is not a user's number", identity, rest)
		}
		return "uid:" + strconv.FormatUint(uid, 10), nil
	}
	if issuers != nil && !slices.Contains(issuers, kind) {
		return "", noIssuer(identity, kind)
	}
	if err := checkNode(identity); err != nil {
		return "", err
	}
	return identity, nil
}

// noIssuer returns the error of an identity, or a pattern of some, of an issuer that is not
// configured.
func noIssuer(identity, issuer string) error {
	advice := ""
	if !strings.ContainsFunc(issuer, func(r rune) bool { return r != '-' && (r < '0' || r > '9') && (r < 'a' || r > 'z') }) {
		advice = fmt.Sprintf(" (a token's needs [issuers.%s] in copilot.toml)", issuer)
	}
	return fmt.Errorf("%q: there is no issuer %q%s: %s", identity, issuer, advice, identityForms)
}

// canonicalPattern returns a pattern of identities as they are compared. It is an
// error if it matches none that a client could have.
func canonicalPattern(pattern string, issuers []string) (string, error) {
	literal, _, hasStar := strings.Cut(pattern, "*")
	if !hasStar {
		return Canonical(pattern, issuers)
	}
	kind, rest, ok := strings.Cut(literal, ":")
	if !ok {
		return pattern, nil // the star stands for the rest of the kind
	}
	switch kind {
	case "dns":
		if strings.HasSuffix(pattern, ".") {
			return "", fmt.Errorf("%q matches no host name: they are compared without the dot at their end", pattern)
		}
		return strings.ToLower(pattern), nil
	case "spiffe":
		// Up to the star it has to be what a SPIFFE ID begins with.
		domain, path, hasPath := strings.Cut(strings.TrimPrefix(rest, "//"), "/")
		switch {
		case !strings.HasPrefix(rest, "//") && !strings.HasPrefix("//", rest):
			return "", fmt.Errorf("%q matches no SPIFFE ID, which begins with spiffe://", pattern)
		case domain != strings.ToLower(domain):
			return "", fmt.Errorf("%q matches no SPIFFE ID: trust domains are in lower case", pattern)
		case hasPath && strings.ContainsAny(path, "%?#"), strings.ContainsAny(domain, "%?#@:"):
			return "", fmt.Errorf("%q matches no SPIFFE ID: they have no query, fragment, port or percent-encoding", pattern)
		}
		return pattern, nil
	case "cn", "uid":
		return pattern, nil
	}
	if issuers == nil {
		return pattern, nil
	}
	for _, name := range issuers {
		if name == kind {
			return pattern, nil
		}
	}
	return "", noIssuer(pattern, kind)
}

// mayBeOfIssuer reports whether a pattern may match the subject of a token.
func mayBeOfIssuer(pattern string) bool {
	kind, _, ok := strings.Cut(pattern, ":")
	return pattern != Anonymous && !(ok && slices.Contains([]string{"spiffe", "dns", "cn", "uid"}, kind))
}
