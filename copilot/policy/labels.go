package policy

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// selector is what a rule wants a pod's labels to be. It is a Kubernetes label selector, all
// of whose requirements have to be met: key, !key, key=value, key==value, key!=value,
// key in (value,…) and key notin (value,…).
type selector []requirement

// requirement is one of a selector: that a label is there, with one of values unless they
// are nil, or that it is not so.
type requirement struct {
	key    string
	values []string
	not    bool
}

const (
	maxSelector = 4096 // bytes
	maxName     = 63   // bytes of a label's value, and of its key after the slash
)

var (
	selectorToken = regexp.MustCompile(`==|!=|[=!(),]|[^\s=!(),]+`)
	labelName     = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$`)
)

func parseSelector(text string) (selector, error) {
	if len(text) > maxSelector {
		return nil, fmt.Errorf("it has more than %d bytes", maxSelector)
	}
	tokens := selectorToken.FindAllString(text, -1)
	if len(tokens) == 0 {
		return nil, errors.New("it is empty, and would be for every pod: name labels, or remove it")
	}
	peek := func() string {
		if len(tokens) == 0 {
			return ""
		}
		return tokens[0]
	}
	next := func() string {
		token := peek()
		tokens = tokens[min(1, len(tokens)):]
		return token
	}
	var s selector
	for {
		var r requirement
		if r.not = peek() == "!"; r.not {
			next()
		}
		r.key = next()
		if err := checkLabelKey(r.key); err != nil {
			return nil, err
		}
		if operator := peek(); !r.not && operator != "" && operator != "," {
			next()
			switch operator {
			case "=", "==", "!=":
				r.not = operator == "!="
				value := "" // as in key=
				if t := peek(); t != "" && t != "," {
					value = next()
				}
				r.values = []string{value}
			case "in", "notin":
				r.not = operator == "notin"
				for separator := "("; separator != ")"; separator = peek() {
					if t := next(); t != separator {
						return nil, fmt.Errorf("%s %s is followed by values in parentheses, as in tier in (gold,silver)", r.key, operator)
					}
					r.values = append(r.values, next())
					if t := peek(); t != "," && t != ")" {
						return nil, fmt.Errorf("%s %s: the parenthesis is not closed", r.key, operator)
					}
				}
				next()
			default:
				return nil, fmt.Errorf("%q after %s: the operators are =, ==, !=, in and notin", operator, r.key)
			}
		}
		for _, v := range r.values {
			if v != "" && (len(v) > maxName || !labelName.MatchString(v)) {
				return nil, fmt.Errorf("%.100q is not a label's value", v)
			}
		}
		s = append(s, r)
		switch t := next(); t {
		case "":
			return s, nil
		case ",":
		default:
			return nil, fmt.Errorf("a comma is missing before %q", t)
		}
	}
}

func checkLabelKey(key string) error {
	prefix, name, ok := strings.Cut(key, "/")
	if !ok {
		prefix, name = "", key
	}
	if len(name) > maxName || !labelName.MatchString(name) || len(prefix) > maxSubdomain || ok && !subdomain.MatchString(prefix) {
		return fmt.Errorf("%.400q is not a label's key", key)
	}
	return nil
}

func (r requirement) isMet(labels map[string]string) bool {
	value, ok := labels[r.key]
	return (ok && (r.values == nil || slices.Contains(r.values, value))) != r.not
}

// unmet says what labels have in place of what the selector wants, or returns nil.
func (s selector) unmet(labels map[string]string) (list []string) {
	for _, r := range s {
		value, ok := labels[r.key]
		switch {
		case r.isMet(labels):
		case !ok:
			list = append(list, "the pod has no label "+r.key)
		case r.values == nil:
			list = append(list, "the pod has the label "+r.key)
		case r.not:
			list = append(list, fmt.Sprintf("%s is %q", r.key, value))
		default:
			list = append(list, fmt.Sprintf("%s is %q, not %s", r.key, value, quoted(r.values, " or ")))
		}
	}
	return list
}

// checkLabels checks a rule's selector of labels, if it has one.
func (r *rule) checkLabels() (err error) {
	if r.Workloads != nil && slices.ContainsFunc(r.claims, func(c claim) bool { return c.name == "labels" }) {
		return errors.New("claims: labels is a setting of a rule with workloads: write it above [rule.claims]")
	}
	if r.Labels == nil {
		return nil
	}
	if r.Workloads == nil {
		return errors.New("labels are those of workloads' pods: name the workloads too, as in workloads = [\"prod/*\"]")
	}
	if r.selector, err = parseSelector(*r.Labels); err != nil {
		return fmt.Errorf("labels: %w", err)
	}
	return nil
}

// labelsWarning says that labels are all that keeps pods from what a rule allows, or
// returns "": the author of a pod chooses its labels.
func (r *rule) labelsWarning() string {
	if r.selector == nil || r.Deny {
		return ""
	}
	for _, p := range r.Workloads {
		if namespace, _, _ := strings.Cut(p, "/"); strings.Trim(namespace, "*") == "" {
			return fmt.Sprintf("%s: workloads: %q is for every namespace, and those who create a pod choose its labels: name the namespaces", r, p)
		}
	}
	return ""
}

// wantsLabels reports whether the labels of a pod are those that a rule is for. Labels that
// are not known, nil, are those that each rule denies, and that none allows.
func (r *rule) wantsLabels(labels map[string]string) bool {
	if labels == nil {
		return r.selector == nil || r.Deny
	}
	return len(r.selector.unmet(labels)) == 0
}

// LabelKeys returns the keys of the pods' labels on which it depends whether who may do
// action with kek. It is not nil.
func (p *Policy) LabelKeys(who Principal, kek string, action Action) []string {
	keys := []string{}
	for i := range p.rules {
		r := &p.rules[i]
		if r.selector == nil || !slices.Contains(r.Actions, action) || !matchAny(r.KEKs, kek) || !matchIdentity(r.Identities, who.Identity) || !matchAny(r.Workloads, who.Workload) {
			continue
		}
		for _, want := range r.selector {
			keys = append(keys, want.key)
		}
	}
	slices.Sort(keys)
	return slices.Compact(keys)
}
