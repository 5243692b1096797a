package client

import (
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"time"

	"github.com/ctrlplane/pilot/internal/wireformat"
)

const (
	maxAnswer       = 128 << 10 // bytes of an answer that are read: 64 KiB in base64, and more
	maxErrorMessage = 300       // bytes of a broker's error message that are repeated
)

// errNoSuchPath: copilot's API has no such path. That says nothing about the KEK.
var errNoSuchPath = errors.New("the path in the broker's URL is wrong")

// problem is copilot's problem document (RFC 9457).
type problem struct {
	Type    string `json:"type"`
	Title   string `json:"title"`
	Status  int    `json:"status"`
	Detail  string `json:"detail"`
	Request string `json:"request"` // its id in copilot's audit log
}

// requestID matches what copilot calls a request. Nothing else that answers with
// problem documents has such a member.
var requestID = regexp.MustCompile(`^[0-9a-f]{16}$`)

// problemOf returns the problem document in an answer, if copilot wrote it. Proxies,
// and other services at that address, use the same statuses for errors of their own,
// which say nothing about a KEK.
func problemOf(resp *http.Response, body []byte) (p problem, ok bool) {
	ok = contentType(resp) == "application/problem+json" && json.Unmarshal(body, &p) == nil &&
		p.Status == resp.StatusCode && requestID.MatchString(p.Request)
	return p, ok
}

// contentType returns the media type of an answer without its parameters.
func contentType(resp *http.Response) string {
	kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	return kind
}

// check passes a successful answer to accept, and otherwise returns an error that
// describes it. accept gets JSON or, with the original's API, a key.
func (r request) check(resp *http.Response, body []byte, accept func(answer []byte) error) (retry, error) {
	want := "application/json"
	if r.original {
		want = "application/octet-stream"
	}
	if resp.StatusCode == http.StatusOK && contentType(resp) == want {
		err := accept(body)
		return retry{possible: err != nil}, err
	}
	if p, ok := problemOf(resp, body); ok {
		return retryOf(resp), p.err()
	}
	if r.original && resp.StatusCode == http.StatusNotFound && len(body) == 0 {
		return retry{}, notFound(resp.Status)
	}
	again := retryOf(resp)
	again.possible = true // it may be copilot again in a moment
	return again, fmt.Errorf("%w: %s", ErrUnavailable, stranger(resp, want))
}

// err returns what a problem document means.
func (p problem) err() error {
	said := fmt.Sprintf("%d %s", p.Status, http.StatusText(p.Status))
	if p.Detail == ErrNotFound.Error() {
		// It is said already.
	} else if p.Detail != "" {
		said += ": " + p.Detail
	} else if p.Title != "" {
		said += ": " + p.Title
	}
	said = printable(said)
	switch {
	case p.Type == wireformat.ProblemNoSuchPath:
		return fmt.Errorf("%w: %w, or a proxy changes it (%s)", ErrUnavailable, errNoSuchPath, said)
	case p.Type == wireformat.ProblemNoSuchVersion && p.Status == http.StatusNotFound:
		return fmt.Errorf("%w (%s)", ErrNoVersion, said)
	case p.Type == wireformat.ProblemNotExported && p.Status == http.StatusConflict:
		return fmt.Errorf("%w (%s)", ErrNotExported, said)
	}
	switch p.Status {
	case http.StatusNotFound:
		return notFound(said)
	case http.StatusUnauthorized: // it says nothing of a KEK
		return fmt.Errorf("%w: the broker rejected our credentials (%s)", ErrUnavailable, said)
	case http.StatusForbidden:
		return fmt.Errorf("%w (%s)", ErrForbidden, said)
	case http.StatusBadRequest, http.StatusConflict, http.StatusRequestEntityTooLarge, http.StatusUnprocessableEntity:
		return fmt.Errorf("%w (%s)", ErrRejected, said)
	}
	return fmt.Errorf("%w: it answered %s", ErrUnavailable, said)
}

func notFound(said string) error {
	return fmt.Errorf("%w (%s): check the name, or create it with \"copilot keys create\"", ErrNotFound, said)
}

// stranger describes an answer that is not copilot's. It leaves out the body, which is
// untrusted.
func stranger(resp *http.Response, want string) string {
	s := "HTTP status " + resp.Status
	if resp.StatusCode == http.StatusOK {
		s += fmt.Sprintf(" with content type %q instead of %s", resp.Header.Get("Content-Type"), want)
	}
	if server := resp.Header.Get("Server"); server != "" {
		s += fmt.Sprintf(" from the server %q", server)
	}
	s += " is not from copilot: "
	switch location, err := url.Parse(resp.Header.Get("Location")); {
	case resp.StatusCode == http.StatusProxyAuthRequired, resp.StatusCode == http.StatusNetworkAuthenticationRequired:
		s += "a proxy on the network path requires a login"
	case resp.StatusCode == http.StatusUnauthorized:
		s += "a proxy in front of copilot requires a login"
	case resp.StatusCode/100 == 3 && err == nil && location.Host != "":
		s += fmt.Sprintf("it redirects to %s://%s, which is not followed: name the broker's own address, or log in to the network", location.Scheme, location.Host)
	default:
		s += "a proxy, an ingress, a firewall or another service answered"
	}
	return printable(s)
}

// retryOf returns whether a retry may succeed. 502 means that the KMS denies access to
// copilot, which only an administrator can fix.
func retryOf(resp *http.Response) retry {
	r := retry{possible: resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode == http.StatusServiceUnavailable}
	if seconds, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && seconds > 0 {
		r.after = time.Duration(min(seconds, 3600)) * time.Second
	}
	return r
}
