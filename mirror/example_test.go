package mirror_test

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/ctrlplane/pilot/mirror"
)

// A mirror of one registry, whose callers know a secret.
func ExampleNew() {
	upstream := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer upstream.Close()
	s := httptest.NewServer(mirror.New(mirror.Config{
		Upstream: strings.TrimPrefix(upstream.URL, "http://"),
		Secret:   "JZ4QKDYTT3FHZ5CSZSDGX7LDXI",
	}))
	defer s.Close()
	for _, secret := range []string{"", "JZ4QKDYTT3FHZ5CSZSDGX7LDXI"} {
		req, err := http.NewRequest(http.MethodGet, s.URL+"/v2/team/app/manifests/1", nil)
		if err != nil {
			log.Fatal(err)
		}
		req.Header.Set(mirror.SecretHeader, secret)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			log.Fatal(err)
		}
		resp.Body.Close()
		fmt.Println(resp.Status)
	}
	// Output:
	// 401 Unauthorized
	// 404 Not Found
}
