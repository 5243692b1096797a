package registry

import (
	"encoding/json"
	"errors"
	"net/url"
	"slices"
	"strings"
	"unicode"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
)

// Error is the error of a request to a registry, or to what gives tokens for it. Its text
// has the request and its outcome once, and not what each layer of the client says of it.
type Error struct {
	text string
	err  error
}

func (e *Error) Error() string { return e.text }

func (e *Error) Unwrap() error { return e.err }

// plainly returns the error of a request to a host as an [Error]. Others stay as they are.
func plainly(host string, err error) error {
	if already := (*Error)(nil); err == nil || errors.As(err, &already) {
		return err
	}
	if status, ok := errors.AsType[remoteerrors.ErrUnexpectedStatus](err); ok {
		text := requested(status.RequestMethod, status.RequestURL) + ": " + status.Status
		if reason := Reason(status.Body); reason != "" {
			text += ": " + reason
		}
		return &Error{text, err}
	}
	if failed, ok := errors.AsType[*url.Error](err); ok {
		return &Error{requested(strings.ToUpper(failed.Op), failed.URL) + ": " + failed.Err.Error(), err}
	}
	if errors.Is(err, docker.ErrInvalidAuthorization) {
		inner := err
		for next := errors.Unwrap(inner); next != nil && next != docker.ErrInvalidAuthorization; next = errors.Unwrap(inner) {
			inner = next
		}
		return &Error{host + ": " + inner.Error(), err}
	}
	return err
}

// requested returns a request for messages. In the query, uploads have tokens.
func requested(method, address string) string {
	address, _, _ = strings.Cut(address, "?")
	return method + " " + address
}

// isBlobUnknown reports whether a registry refused a manifest since it has not all of its
// blobs. docker-registry says so too while another client uploads one of them once more.
func isBlobUnknown(err error) bool {
	status, ok := errors.AsType[remoteerrors.ErrUnexpectedStatus](err)
	return ok && slices.ContainsFunc(Refusals(status.Body), func(r Refusal) bool {
		return r.Code == "MANIFEST_BLOB_UNKNOWN"
	})
}

// Refusal is one of the errors in a registry's response:
// https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md#error-codes.
type Refusal struct {
	Code    string          `json:"code"`
	Message string          `json:"message"`
	Detail  json.RawMessage `json:"detail"`
}

// Refusals returns the errors in the body of a registry's response, or nil if it is not of
// that form.
func Refusals(body []byte) []Refusal {
	var list struct {
		Errors []Refusal `json:"errors"`
	}
	if json.Unmarshal(body, &list) != nil {
		return nil
	}
	return list.Errors
}

// maxReason bounds what is shown of a registry's reason, in bytes.
const maxReason = 500

// Reason returns the errors in the body of a registry's response as a line of text, or
// nothing.
func Reason(body []byte) string {
	var reasons []string
	for _, e := range Refusals(body) {
		text := strings.Trim(e.Code+": "+e.Message, ": ")
		if detail := string(e.Detail); detail != "" && detail != "null" && detail != "{}" {
			text += ": " + strings.Trim(detail, `"`)
		}
		reasons = append(reasons, text)
	}
	reason := strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.Join(reasons, "; "))
	if len(reason) > maxReason {
		reason = strings.ToValidUTF8(reason[:maxReason], "") + "…"
	}
	return reason
}
