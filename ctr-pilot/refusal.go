package main

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"

	"github.com/ctrlplane/pilot/image/registry"
)

// maxDetail bounds what is shown of a registry's reason, in bytes.
const maxDetail = 500

// explainRefusal adds to the error of a push why the registry refused a manifest, which
// containerd leaves out, and that encrypted layers may be the reason.
func explainRefusal(err error) error {
	var status remoteerrors.ErrUnexpectedStatus
	if !errors.As(err, &status) || status.RequestMethod != http.MethodPut || !strings.Contains(status.RequestURL, "/manifests/") {
		return err
	}
	err = fmt.Errorf("the registry refused the manifest: %w", status)
	reason, codes := reasonOf(status.Body)
	if reason != "" {
		err = fmt.Errorf("%w: %s", err, reason)
	}
	if maybeMediaTypes(status.StatusCode, codes) {
		err = fmt.Errorf("%w (some registries, such as Amazon ECR, JFrog Artifactory and Quay, refuse media types that they do not know, as encrypted layers have, unless they are configured to take them)", err)
	}
	return err
}

// maybeMediaTypes reports whether a registry that refuses a manifest may do so because
// of its media types: the status is one of a bad request, and no code has another reason.
func maybeMediaTypes(status int, codes []string) bool {
	wrong := []int{http.StatusBadRequest, http.StatusMethodNotAllowed, http.StatusNotAcceptable, http.StatusUnsupportedMediaType, http.StatusUnprocessableEntity}
	other := func(code string) bool {
		return code != "" && code != "MANIFEST_INVALID" && code != "UNSUPPORTED" && code != "UNKNOWN"
	}
	return slices.Contains(wrong, status) && !slices.ContainsFunc(codes, other)
}

// reasonOf returns the messages and the codes of the errors in a registry's response.
func reasonOf(body []byte) (reason string, codes []string) {
	var reasons []string
	for _, e := range registry.Refusals(body) {
		text := strings.Trim(e.Code+": "+e.Message, ": ")
		if detail := string(e.Detail); detail != "" && detail != "null" && detail != "{}" {
			text += ": " + strings.Trim(detail, `"`)
		}
		reasons, codes = append(reasons, text), append(codes, e.Code)
	}
	reason = shownText(strings.Join(reasons, "; "))
	if len(reason) > maxDetail {
		reason = strings.ToValidUTF8(reason[:maxDetail], "") + "…"
	}
	return reason, codes
}
