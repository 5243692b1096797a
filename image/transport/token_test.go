package transport

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/image"
)

// TestTokensAreRenewed has a registry end a token before the time that it named.
func TestTokensAreRenewed(t *testing.T) {
	ec, _ := newKey(t)
	var mu sync.Mutex
	tokens, used := 0, 0
	address := newRegistry(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			if r.URL.Path == "/token" {
				tokens, used = tokens+1, 0
				fmt.Fprintf(w, `{"token":"t%d","expires_in":300}`, tokens)
				mu.Unlock()
				return
			}
			used++
			ok := r.Header.Get("Authorization") == fmt.Sprintf("Bearer t%d", tokens) && used < 5
			given := r.Header.Get("Authorization") != ""
			mu.Unlock()
			if !ok {
				challenge := `Bearer realm="http://` + r.Host + `/token",service="x",scope="repository:app:pull,push"`
				if given {
					challenge += `,error="invalid_token"`
				}
				w.Header().Set("WWW-Authenticate", challenge)
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			h.ServeHTTP(w, r)
		})
	})
	dir, _, _ := oneLayer(t, 40<<20)
	hosts := docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost), docker.WithAuthorizer(docker.NewDockerAuthorizer()))
	_, err := crypt(t, source(t, "oci:"+dir+":app", nil), target(t, "docker://"+address+"/app:1", hosts), func(ctx context.Context, cs image.Store, desc ocispec.Descriptor) (image.Result, error) {
		return image.Encrypt(ctx, cs, desc, ec, image.Options{})
	})
	if err != nil {
		t.Error(err)
	}
}
