package main

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/image/registry"
)

// explainRefusal adds to the error of a push why the registry refused a manifest, which
// containerd leaves out, and that encrypted layers may be the reason.
func explainRefusal(err error) error {
	var status remoteerrors.ErrUnexpectedStatus
	if !errors.As(err, &status) || status.RequestMethod != http.MethodPut || !strings.Contains(status.RequestURL, "/manifests/") {
		return err
	}
	err = fmt.Errorf("the registry refused the manifest: %w", status)
	if reason := registry.Reason(status.Body); reason != "" {
		err = fmt.Errorf("%w: %s", err, reason)
	}
	if maybeMediaTypes(status.StatusCode, registry.Refusals(status.Body)) {
		err = fmt.Errorf("%w (some registries, such as Amazon ECR, JFrog Artifactory and Quay, refuse media types that they do not know, as encrypted layers have, unless they are configured to take them)", err)
	}
	return err
}

// maybeMediaTypes reports whether a registry that refuses a manifest may do so because
// of its media types: the status is one of a bad request, and no code has another reason.
func maybeMediaTypes(status int, reasons []registry.Refusal) bool {
	wrong := []int{http.StatusBadRequest, http.StatusMethodNotAllowed, http.StatusNotAcceptable, http.StatusUnsupportedMediaType, http.StatusUnprocessableEntity}
	other := func(r registry.Refusal) bool {
		return r.Code != "" && r.Code != "MANIFEST_INVALID" && r.Code != "UNSUPPORTED" && r.Code != "UNKNOWN"
	}
	return slices.Contains(wrong, status) && !slices.ContainsFunc(reasons, other)
}

// explainRegistry adds to the error of a registry what to do about it.
func explainRegistry(cmd *cli.Command, err error) error {
	failed, ok := errors.AsType[*registry.Error](err)
	if !ok {
		return err
	}
	status, _ := errors.AsType[remoteerrors.ErrUnexpectedStatus](failed)
	_, unknownCA := errors.AsType[x509.UnknownAuthorityError](failed)
	switch {
	case errors.Is(failed, docker.ErrInvalidAuthorization), status.StatusCode == http.StatusUnauthorized:
		return fmt.Errorf("%w: user and password are wrong, or missing: give --user, or those of \"docker login\" or \"podman login\"", err)
	case status.StatusCode == http.StatusForbidden:
		return fmt.Errorf("%w: this user may not do that: --user and \"docker login\" name another", err)
	case status.StatusCode == http.StatusBadRequest && cmd.Bool("plain-http"):
		return fmt.Errorf("%w: a registry that speaks TLS may say so: leave --plain-http out", err)
	case unknownCA:
		return fmt.Errorf("%w: name the CA that issued the registry's certificate with --tlscacert", err)
	case errors.Is(failed, http.ErrSchemeMismatch):
		return fmt.Errorf("%w: use --plain-http", err)
	}
	return err
}
