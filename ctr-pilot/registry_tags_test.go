package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/cmd/ctr/commands"
	"github.com/urfave/cli/v3"
)

// tagServer is a registry that lists tags in pages, for clients with a token, which it
// gives to those that know the password.
func tagServer(t *testing.T, tags []string) (address string, asked *int) {
	t.Helper()
	asked = new(int)
	mux := http.NewServeMux()
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	mux.HandleFunc("/token", func(w http.ResponseWriter, r *http.Request) {
		if r.PostFormValue("username") != "ci" || r.PostFormValue("password") != "secret" || !strings.HasPrefix(r.PostFormValue("scope"), "repository:team/") {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		json.NewEncoder(w).Encode(map[string]string{"access_token": "t"})
	})
	mux.HandleFunc("/v2/team/app/tags/list", func(w http.ResponseWriter, r *http.Request) {
		*asked++
		if r.Header.Get("Authorization") != "Bearer t" {
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+s.URL+`/token",service="registry"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		from := 0
		if last := r.URL.Query().Get("last"); last != "" {
			from, _ = strconv.Atoi(last)
		}
		to := min(from+3, len(tags))
		if to < len(tags) {
			// As a registry that does not know of a proxy in front of it.
			w.Header().Set("Link", fmt.Sprintf(`<http://inside.example.com/v2/team/app/tags/list?n=3&last=%d>; rel="next"`, to))
		}
		json.NewEncoder(w).Encode(map[string]any{"name": "team/app", "tags": tags[from:to]})
	})
	return strings.TrimPrefix(s.URL, "http://"), asked
}

// withRegistry calls f with the registries that flags reach.
func withRegistry(t *testing.T, f func(ctx context.Context, p *places), flags ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := &cli.Command{Flags: commands.RegistryFlags, Action: func(ctx context.Context, cmd *cli.Command) error {
		return withPlaces(ctx, cmd, nil, func(ctx context.Context, p *places) error {
			f(ctx, p)
			return nil
		})
	}}
	if err := cmd.Run(ctx, append([]string{"test", "--plain-http"}, flags...)); err != nil {
		t.Error(err)
	}
}

func TestPatternsMatchTags(t *testing.T) {
	tags := []string{"v1", "v2", "v10", "latest", "v1.2", "../x", "v3-rc", "v2"}
	address, asked := tagServer(t, tags)
	withRegistry(t, func(ctx context.Context, p *places) {
		for pattern, want := range map[string][]string{
			"*":      {"v1", "v2", "v10", "latest", "v1.2", "v3-rc", "v2"},
			"v?":     {"v1", "v2", "v2"},
			"v1*":    {"v1", "v10", "v1.2"},
			"V*":     nil,
			"v1.?":   {"v1.2"},
			"latest": {"latest"},
		} {
			got, err := p.tagNames(ctx, address+"/team/app:"+pattern)
			for i := range got {
				got[i] = strings.TrimPrefix(got[i], address+"/team/app:")
			}
			if err != nil || !slices.Equal(got, want) {
				t.Errorf("%s: %q, %v, want %q", pattern, got, err, want)
			}
		}
		if *asked != 6*3+1 {
			t.Errorf("asked %d times: a token is asked for once", *asked)
		}
		if _, err := p.tagNames(ctx, address+"/team/other:*"); err == nil || !strings.Contains(err.Error(), "404") {
			t.Errorf("a repository that is not there: %v", err)
		}
	}, "--user", "ci:secret")
	withRegistry(t, func(ctx context.Context, p *places) {
		if got, err := p.tagNames(ctx, address+"/team/app:*"); err == nil {
			t.Errorf("with a wrong password: %q", got)
		}
	}, "--user", "ci:wrong")
}
