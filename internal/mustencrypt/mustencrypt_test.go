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
		if _, repository, ok := r.ForAll(Sources(map[string]string{"containerd.io/distribution.source.r.example.com": source, "other": "x"})); ok != want {
			t.Errorf("%q: %s, %t", source, repository, ok)
		}
	}
	// containerd forgets the port.
	ports := Rules{{Images: []string{"r.example.com:5000/a/*", "[::1]:5000/a/*", "*/c"}}}
	for repository, want := range map[string]bool{"r.example.com/a/x": true, "::1/a/x": true, "r.example.com/b": false, "r.example.com/c": true} {
		if _, _, ok := ports.ForAll([]string{repository}); ok != want {
			t.Errorf("%s: %t", repository, ok)
		}
	}
	if _, _, ok := r.ForAll(nil); ok {
		t.Error("a layer without labels is of an image with a rule")
	}
}
