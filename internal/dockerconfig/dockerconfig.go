// Package dockerconfig finds the credentials for registries that "docker login" and
// "podman login" have stored.
package dockerconfig

import (
	"context"
	"fmt"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

// helperTimeout bounds the wait for a credential helper, which may ask a service.
const helperTimeout = 30 * time.Second

// Credentials returns the credentials that Docker's or Podman's configuration has for a
// registry, for containerd: the user and the password, no user and a refresh token, or
// neither.
func Credentials(ctx context.Context, host string) (user, secret string, err error) {
	if host == "registry-1.docker.io" {
		host = "docker.io"
	}
	registry, err := name.NewRegistry(host)
	if err != nil {
		return "", "", err
	}
	ctx, cancel := context.WithTimeout(ctx, helperTimeout)
	defer cancel()
	type found struct {
		*authn.AuthConfig
		err error
	}
	// A helper can't be cancelled.
	answer := make(chan found, 1)
	go func() {
		a, err := authn.DefaultKeychain.Resolve(registry)
		if err != nil {
			answer <- found{err: err}
			return
		}
		conf, err := a.Authorization()
		answer <- found{conf, err}
	}()
	var f found
	select {
	case f = <-answer:
	case <-ctx.Done():
		f.err = fmt.Errorf("its credential helper does not answer: %w", ctx.Err())
	}
	switch {
	case f.err != nil:
		return "", "", f.err
	case f.IdentityToken != "":
		return "", f.IdentityToken, nil
	}
	return f.Username, f.Password, nil
}
