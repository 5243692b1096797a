package workloads

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

const (
	// maxBody bounds requests and answers, in bytes.
	maxBody       = 256 << 10
	authorizePath = "/authorize"
	// waitParameter says how long an answer is waited for, such as 1.5s.
	waitParameter = "wait"
)

// NewServer returns a server for a [Plugin] on the same node: POST /authorize with a
// [Container] as JSON. It answers 200, 403 if the container may not be created, or 503 if
// that could not be decided; errors are text.
func NewServer(a *Authorizer) *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+authorizePath, func(w http.ResponseWriter, r *http.Request) {
		var c Container
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&c); err != nil {
			http.Error(w, "not the JSON of a container", http.StatusBadRequest)
			return
		}
		wait, err := time.ParseDuration(r.URL.Query().Get(waitParameter))
		if err != nil {
			http.Error(w, waitParameter+" is not a duration", http.StatusBadRequest)
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), wait)
		defer cancel()
		var denial *Denial
		switch err := a.Authorize(ctx, c); {
		case errors.As(err, &denial):
			http.Error(w, err.Error(), http.StatusForbidden)
		case err != nil:
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
		}
	})
	return &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
}

// remote asks the Authorizer of the pilot that listens on a socket.
type remote struct {
	http http.Client
}

func newRemote(socket string) *remote {
	return &remote{http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}}
}

// errAway is the error if pilot gives no answer.
var errAway = errors.New("pilot gives no answer")

// authorize returns nil if pilot allows a container, and an error that wraps errAway if it
// gives no answer before ctx is done.
func (r *remote) authorize(ctx context.Context, c Container) error {
	b, err := json.Marshal(c)
	if err != nil {
		return err
	}
	deadline, _ := ctx.Deadline()
	// pilot's own answer, why it can't decide, comes before ctx is done.
	wait := time.Until(deadline) * 4 / 5
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://pilot"+authorizePath+"?"+waitParameter+"="+wait.String(), bytes.NewReader(b))
	if err != nil {
		return err
	}
	resp, err := r.http.Do(req)
	if err != nil {
		return fmt.Errorf("%w: %w", errAway, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return fmt.Errorf("%w: %w", errAway, err)
	}
	switch resp.StatusCode {
	case http.StatusOK:
		return nil
	case http.StatusForbidden, http.StatusServiceUnavailable, http.StatusBadRequest:
		return errors.New(string(bytes.TrimSpace(text)))
	}
	return fmt.Errorf("%w: %s", errAway, resp.Status)
}
