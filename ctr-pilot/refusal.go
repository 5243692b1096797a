package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
)

// maxDetail bounds what is shown of a registry's reason, in bytes.
const maxDetail = 500

// explainRefusal makes the error of a push say why the registry refused a manifest,
// which containerd leaves out, and that encrypted layers may be why.
func explainRefusal(err error) error {
	var status remoteerrors.ErrUnexpectedStatus
	if !errors.As(err, &status) || status.RequestMethod != http.MethodPut || !strings.Contains(status.RequestURL, "/manifests/") {
		return err
	}
	err = fmt.Errorf("the registry refused the manifest: %w", status)
	if reason := reasonOf(status.Body); reason != "" {
		err = fmt.Errorf("%w: %s", err, reason)
	}
	// What a registry answers to a manifest that it does not like.
	refusals := []int{http.StatusBadRequest, http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusNotAcceptable, http.StatusUnsupportedMediaType, http.StatusUnprocessableEntity}
	if slices.Contains(refusals, status.StatusCode) {
		err = fmt.Errorf("%w (some registries, such as Amazon ECR, JFrog Artifactory and Quay, refuse media types that they do not know, as encrypted layers have, unless they are configured to take them)", err)
	}
	return err
}

// reasonOf returns what the errors in a registry's answer say:
// https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md#error-codes.
func reasonOf(body []byte) string {
	var list struct {
		Errors []struct {
			Code    string          `json:"code"`
			Message string          `json:"message"`
			Detail  json.RawMessage `json:"detail"`
		} `json:"errors"`
	}
	if json.Unmarshal(body, &list) != nil {
		return ""
	}
	var reasons []string
	for _, e := range list.Errors {
		reason := strings.Trim(e.Code+": "+e.Message, ": ")
		if detail := string(e.Detail); detail != "" && detail != "null" && detail != "{}" {
			reason += ": " + strings.Trim(detail, `"`)
		}
		reasons = append(reasons, reason)
	}
	text := shownText(strings.Join(reasons, "; "))
	if len(text) > maxDetail {
		text = strings.ToValidUTF8(text[:maxDetail], "") + "…"
	}
	return text
}
