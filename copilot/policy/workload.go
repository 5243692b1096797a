package policy

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// label matches RFC 1123 labels, such as the names of namespaces.
var label = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)

// maxLabel bounds a label, in bytes.
const maxLabel = 63

// CheckWorkload returns an error unless name can be a workload's: NAMESPACE/SERVICEACCOUNT,
// or NAMESPACE/ if the node does not know the account. prod/ matches prod/* and not prod/web.
func CheckWorkload(name string) error {
	namespace, account, ok := strings.Cut(name, "/")
	if !ok || len(namespace) > maxLabel || !label.MatchString(namespace) || len(account) > maxSubdomain || account != "" && !subdomain.MatchString(account) {
		return fmt.Errorf("%.350q is not a workload, which is NAMESPACE/SERVICEACCOUNT", name)
	}
	return nil
}

// checkWorkloads checks a rule's workloads, if it has them.
func (r *rule) checkWorkloads() error {
	if r.Workloads == nil {
		return nil
	}
	if len(r.Workloads) == 0 {
		return errors.New("workloads is an empty array, which no workload matches")
	}
	// A node that has a KEK itself needs no permission for each workload.
	if slices.ContainsFunc(r.Actions, func(a Action) bool { return a != Unwrap }) {
		return errors.New("a rule with workloads is for unwrap only: write another rule for what nodes may do themselves")
	}
	if err := checkPatterns(r.Workloads); err != nil {
		return err
	}
	for _, p := range r.Workloads {
		if !strings.Contains(p, "/") && !strings.Contains(p, "**") {
			return fmt.Errorf("workloads: %q matches none: they are NAMESPACE/SERVICEACCOUNT, as in %q", p, p+"/*")
		}
	}
	return nil
}

// isForWorkload reports whether a rule is for requests with the workload of a principal, or,
// if it has none, without. A rule without workloads is for the node itself; if it denies, for
// its workloads too.
func (r *rule) isForWorkload(who Principal) bool {
	if r.Workloads == nil {
		return who.Workload == "" || r.Deny
	}
	return who.Workload != "" && matchAny(r.Workloads, who.Workload) && r.wantsLabels(who.Labels)
}

// otherWorkload says why a rule that is for a principal, a KEK and an action is not for the
// principal's workload. A higher rank says that the rule is closer to it.
func (r *rule) otherWorkload(who Principal) (why string, rank int) {
	switch {
	case r.Workloads == nil:
		return "is for the node itself, and no rule is for the workload " + who.Workload, 1
	case who.Workload == "":
		return "is for workloads, and the request names none", 2
	case !matchAny(r.Workloads, who.Workload):
		return fmt.Sprintf("is for other workloads: %s is not %s", who.Workload, quoted(r.Workloads, " or ")), 2
	case who.Labels == nil:
		return "is for workloads with labels, and the node does not report the pod's", 3
	}
	return "is for other labels: " + strings.Join(r.selector.unmet(who.Labels), "; "), 3
}
