package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/ctrlplane/pilot/internal/glob"
)

// Principal is who makes a request, as rules see it.
type Principal struct {
	Identity string
	Claims   Claims // of its token; nil without one
	// Workload is the one that a node vouches for in its request, NAMESPACE/SERVICEACCOUNT.
	// It is "" for what the node does itself.
	Workload string
	// Labels are those of the workload's pod, which its author chooses. They are nil if the
	// node does not report them.
	Labels map[string]string
}

// Claims are what an issuer says in a token, as text by name: a string as it is, true
// and false, a number as the token writes it, an array as the texts of its elements. What
// is null or an object is left out.
type Claims map[string][]string

// ParseClaims reads claims from a token's payload, a JSON object.
func ParseClaims(payload []byte) (Claims, error) {
	d := json.NewDecoder(bytes.NewReader(payload))
	d.UseNumber()
	var values map[string]any
	if err := d.Decode(&values); err != nil {
		return nil, errors.New("the claims are not a JSON object")
	}
	claims := make(Claims)
	for name, value := range values {
		list, ok := value.([]any)
		if !ok {
			list = []any{value}
		}
		for _, v := range list {
			switch v := v.(type) {
			case string:
				claims[name] = append(claims[name], v)
			case bool:
				claims[name] = append(claims[name], strconv.FormatBool(v))
			case json.Number:
				claims[name] = append(claims[name], v.String())
			}
		}
	}
	return claims, nil
}

// claim is what a rule wants a claim to be: one of its texts has to match one of the
// patterns.
type claim struct {
	name     string
	patterns []string
}

func (c claim) matches(claims Claims) bool {
	return slices.ContainsFunc(c.patterns, func(p string) bool {
		return slices.ContainsFunc(claims[c.name], func(text string) bool { return glob.MatchPath(p, text) })
	})
}

// unmet says what claims has in place of what the rule wants.
func (c claim) unmet(claims Claims) string {
	texts, ok := claims[c.name]
	if !ok {
		return "the token has no " + c.name
	}
	return fmt.Sprintf("%s is %s, not %s", c.name, quoted(texts, " and "), quoted(c.patterns, " or "))
}

func quoted(texts []string, between string) string {
	list := make([]string, len(texts))
	for i, text := range texts {
		list[i] = strconv.Quote(text)
	}
	return strings.Join(list, between)
}

// optionalSettings are those of a rule that nobody would miss if they were taken for claims,
// as TOML does with what follows the line [rule.claims].
var optionalSettings = []string{"deny", "not-before", "not-after", "workloads"}

// wantedClaims returns the claims of a rule in the file, in the order of their names. A
// value is a string, a number, true or false, or an array of those.
func wantedClaims(values map[string]any) ([]claim, error) {
	if len(values) == 0 {
		return nil, errors.New("claims is empty, so the rule would be for every token: name some, or remove it")
	}
	var list []claim
	for _, name := range slices.Sorted(maps.Keys(values)) {
		if slices.Contains(optionalSettings, name) {
			return nil, fmt.Errorf("claims: %s is a setting of the rule: write it above [rule.claims]", name)
		}
		c := claim{name: name}
		alternatives, ok := values[name].([]any)
		if !ok {
			alternatives = []any{values[name]}
		}
		for _, v := range alternatives {
			switch v := v.(type) {
			case string:
				c.patterns = append(c.patterns, v)
			case bool, int64:
				c.patterns = append(c.patterns, fmt.Sprint(v))
			default:
				return nil, fmt.Errorf("claims: %s has to be a string, a whole number, true or false, or an array of those", name)
			}
		}
		if len(c.patterns) == 0 {
			return nil, fmt.Errorf("claims: %s is an empty array, which no token matches", name)
		}
		if err := checkPatterns(c.patterns); err != nil {
			return nil, fmt.Errorf("claims: %s: %w", name, err)
		}
		list = append(list, c)
	}
	return list, nil
}
