package mustencrypt

import (
	"reflect"
	"strings"
	"testing"
)

func TestRulesAreTheSameInText(t *testing.T) {
	want := Rules{{Images: []string{"registry.example.com/team-a/**", "docker.io/library/*"}, KEKs: []string{"team-a", "eu/*"}}, {Images: []string{"[::1]:5000/x", "localhost/x", "**"}}}
	var got Rules
	if err := got.UnmarshalText([]byte(want.String())); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%s: %+v, %v", want.String(), got, err)
	}
	for _, none := range []string{"", " ", "[]"} {
		if err := got.UnmarshalText([]byte(none)); err != nil || len(got) != 0 || got.String() != "" {
			t.Errorf("%q: %v, %v", none, got, err)
		}
	}
}

func TestRulesThatCantBeMeantAreRefused(t *testing.T) {
	for text, want := range map[string]string{
		`x`:                               "tables of the settings images and keks",
		`{"images":["a.example.com/b"]}`:  "tables of the settings images and keks",
		`[{"image":["a.example.com/b"]}]`: `unknown field "image"`,
		`[{"images":"a.example.com/b"}]`:  "array of strings",
		`[{}]`:                            "rule 1: images is missing",
		`[{"images":["a.example.com/b"]},{"keks":["team-a"]}]`: "rule 2: images is missing",
		`[{"images":["nginx"]}]`:                               "begin with the registry",
		`[{"images":["library/nginx"]}]`:                       "write docker.io/library/nginx for Docker Hub",
		`[{"images":["a.example.com/b:1"]}]`:                   "has a tag",
		`[{"images":["a.example.com/b@sha256:1"]}]`:            "no pattern of repositories",
		`[{"images":["a.example.com/b"],"keks":["team a"]}]`:   "keks: ",
		`[{"images":["a.example.com/b"],"keks":[""]}]`:         "keks: no KEK is named",
	} {
		var r Rules
		if err := r.UnmarshalText([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
	}
}

func TestRuleIsForRepositoriesAndKEKs(t *testing.T) {
	r := Rules{{Images: []string{"r.example.com/a/*"}, KEKs: []string{"a-*"}}, {Images: []string{"r.example.com/**"}}}
	for repository, want := range map[string]int{"r.example.com/a/x": 2, "r.example.com/b": 1, "r.example.com.evil.org/a/x": 0, "evil.org/r.example.com/a/x": 0} {
		if got := len(r.For(repository)); got != want {
			t.Errorf("%s: %d rules, want %d", repository, got, want)
		}
	}
	if !r[0].Allows("a-1") || r[0].Allows("b") || r[0].Allows("xa-1") || !r[1].Allows("b") {
		t.Error("the wrong KEKs are allowed")
	}
}

// TestLayerOfAnotherRepositoryMayBeAnotherImages: only if all repositories have a rule is it
// known that the layer is of an image with one.
func TestLayerOfAnotherRepositoryMayBeAnotherImages(t *testing.T) {
	r := Rules{{Images: []string{"r.example.com/a/*"}}}
	for source, want := range map[string]bool{"a/x": true, "a/x,a/y": true, "a/x,b": false, "b,a/x": false, "": false} {
		if got := r.ForAll(Sources(map[string]string{"containerd.io/distribution.source.r.example.com": source, "other": "x"})); len(got) > 0 != want {
			t.Errorf("%q: %v", source, got)
		}
	}
	// containerd forgets the port.
	ports := Rules{{Images: []string{"r.example.com:5000/a/*", "[::1]:5000/a/*", "*/c"}}}
	for repository, want := range map[string]bool{"r.example.com/a/x": true, "::1/a/x": true, "r.example.com/b": false, "r.example.com/c": true} {
		if got := ports.ForAll([]string{repository}); len(got) > 0 != want {
			t.Errorf("%s: %v", repository, got)
		}
	}
	if got := r.ForAll(nil); got != nil {
		t.Errorf("a layer without labels is of an image with a rule: %v", got)
	}
}

// TestAllRulesOfOneRepositoryCount: a wide rule before a narrow one does not hide it, and
// registries at two ports of a host have rules of their own.
func TestAllRulesOfOneRepositoryCount(t *testing.T) {
	wide, narrow := Rule{Images: []string{"r.example.com/**"}}, Rule{Images: []string{"r.example.com/a/*"}, KEKs: []string{"a"}}
	one, two := Rule{Images: []string{"p.example.com:1/**"}, KEKs: []string{"one"}}, Rule{Images: []string{"p.example.com:2/**"}, KEKs: []string{"two"}}
	r := Rules{wide, narrow, one, two}
	for repositories, want := range map[string][][]Rule{
		"r.example.com/a/x":                 {{wide, narrow}},
		"r.example.com/a/x,r.example.com/b": {{wide, narrow}, {wide}},
		"r.example.com/b,r.example.com/a/x": {{wide, narrow}, {wide}},
		"p.example.com/x":                   {{one}, {two}},
		"p.example.com/x,q.example.com/x":   nil,
	} {
		var got [][]Rule
		for _, a := range r.ForAll(strings.Split(repositories, ",")) {
			got = append(got, a.Rules)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v, want %v", repositories, got, want)
		}
	}
}
