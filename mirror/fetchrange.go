package mirror

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"path"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/image/registry"
	"github.com/ctrlplane/pilot/internal/version"
)

const (
	// rangeAttempts is how often a range is requested before it fails. The snapshotter
	// tries again too.
	rangeAttempts = 3
	// rangePause is the wait before the second attempt. It doubles.
	rangePause = 200 * time.Millisecond
	// rangeStall is how long a registry may take for its answer, and for each part of it.
	rangeStall = 20 * time.Second
)

// rangeError is the error of a registry whose answer is not the range that it was asked for.
type rangeError struct{ host, problem string }

func (e *rangeError) Error() string {
	return fmt.Sprintf("%s was asked for a range of a blob, and %s", e.host, e.problem)
}

// fetchRange requests a range of a blob. The body has so many bytes, or ends with an error.
func (r *repository) fetchRange(ctx context.Context, blob ocispec.Descriptor, offset, length int64) (io.ReadCloser, error) {
	hosts, err := registry.Guarded(func(string) ([]docker.RegistryHost, error) { return r.upstream.hosts, nil })(r.registry)
	if err != nil {
		return nil, err
	}
	spec, err := reference.Parse(r.key() + "@" + blob.Digest.String())
	if err != nil {
		return nil, err
	}
	ctx, err = docker.ContextWithRepositoryScope(ctx, spec, false)
	if err != nil {
		return nil, err
	}
	failure := fmt.Errorf("no host of %s has blobs: %w", r.registry, errdefs.ErrNotFound)
	for i, host := range hosts {
		if !host.Capabilities.Has(docker.HostCapabilityPull) {
			continue
		}
		body, err := r.fetchRangeFrom(ctx, host, blob, offset, length)
		if err == nil {
			return body, nil
		}
		if i == 0 || !errdefs.IsNotFound(err) {
			failure = err
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, failure
}

func (r *repository) fetchRangeFrom(ctx context.Context, host docker.RegistryHost, blob ocispec.Descriptor, offset, length int64) (io.ReadCloser, error) {
	u := rangeURL(host, r.registry, r.repository, blob.Digest)
	var seen []*http.Response // that refuse the credentials
	for n, wait := 1, rangePause; ; n, wait = n+1, 2*wait {
		resp, err := sendRangeRequest(ctx, host, u, offset, length)
		if err != nil {
			if n >= rangeAttempts || ctx.Err() != nil {
				return nil, err
			}
			if err := sleep(ctx, wait); err != nil {
				return nil, err
			}
			continue
		}
		if resp.StatusCode == http.StatusUnauthorized && host.Authorizer != nil && len(seen) == 0 && resp.Request.URL.Host == u.Host {
			resp.Body.Close()
			seen = append(seen, resp)
			switch err := host.Authorizer.AddResponses(ctx, seen); {
			case err == nil:
				continue // with a new token, at once
			case !errdefs.IsNotImplemented(err):
				return nil, err
			}
			return nil, remoteerrors.NewUnexpectedStatusErr(resp)
		}
		if resp.StatusCode/100 == 2 {
			return checkRange(resp, u.Host, offset, length, blob.Size)
		}
		err = remoteerrors.NewUnexpectedStatusErr(resp)
		resp.Body.Close()
		switch {
		case resp.StatusCode == http.StatusNotFound:
			return nil, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
		case n >= rangeAttempts || resp.StatusCode < 500 && resp.StatusCode != http.StatusTooManyRequests && resp.StatusCode != http.StatusRequestTimeout:
			return nil, err
		}
		if resp.StatusCode == http.StatusTooManyRequests {
			// The caller does longer waits itself: the answer says how long.
			if left := r.upstream.throttle.leftAt(resp.Request.URL.Host); left > wait {
				if left > maxThrottleWait {
					return nil, err
				}
				wait = left
			}
		}
		if err := sleep(ctx, wait); err != nil {
			return nil, err
		}
	}
}

// maxThrottleWait is how long a request waits for a registry that wants no more.
const maxThrottleWait = 5 * time.Second

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// rangeURL returns the URL of a blob at a host of a registry.
func rangeURL(host docker.RegistryHost, name, repository string, d digest.Digest) *url.URL {
	u := &url.URL{Scheme: host.Scheme, Host: host.Host, Path: path.Join("/", host.Path, repository, "blobs", d.String())}
	if own, err := docker.DefaultHost(name); err != nil || host.Host != own && host.Host != name {
		u.RawQuery = url.Values{"ns": {name}}.Encode()
	}
	return u
}

// sendRangeRequest makes one request. The body of the answer fails if it stalls.
func sendRangeRequest(ctx context.Context, host docker.RegistryHost, u *url.URL, offset, length int64) (_ *http.Response, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	stalled := time.AfterFunc(rangeStall, func() {
		cancel(fmt.Errorf("%s sent nothing for %v: %w", u.Host, rangeStall, context.DeadlineExceeded))
	})
	defer func() {
		if err != nil {
			stalled.Stop()
			if cause := context.Cause(ctx); cause != nil {
				err = cause
			}
			cancel(nil)
		}
	}()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	maps.Copy(req.Header, host.Header.Clone())
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", offset, offset+length-1))
	req.Header.Set("Accept-Encoding", "identity")
	req.Header.Set("User-Agent", "pilot/"+version.Version)
	if host.Authorizer != nil {
		if err := host.Authorizer.Authorize(ctx, req); err != nil {
			return nil, fmt.Errorf("authorize at %s: %w", host.Host, err)
		}
	}
	resp, err := host.Client.Do(req)
	if err != nil {
		return nil, err
	}
	resp.Body = &stallingBody{resp.Body, ctx, stalled, cancel}
	return resp, nil
}

// stallingBody is a body each read of which has to end in time.
type stallingBody struct {
	io.ReadCloser
	ctx     context.Context
	stalled *time.Timer
	cancel  context.CancelCauseFunc
}

func (b *stallingBody) Read(p []byte) (int, error) {
	b.stalled.Reset(rangeStall)
	n, err := b.ReadCloser.Read(p)
	b.stalled.Stop()
	if cause := context.Cause(b.ctx); err != nil && err != io.EOF && cause != nil {
		err = cause
	}
	return n, err
}

func (b *stallingBody) Close() error {
	b.stalled.Stop()
	err := b.ReadCloser.Close()
	b.cancel(nil)
	return err
}

// checkRange returns the body of an answer that has exactly the range of a blob of so many
// bytes: other bytes would be decrypted as those of that place.
func checkRange(resp *http.Response, host string, offset, length, size int64) (io.ReadCloser, error) {
	problem := ""
	want := fmt.Sprintf("bytes %d-%d/%d", offset, offset+length-1, size)
	switch got := resp.Header.Get("Content-Range"); {
	case resp.StatusCode != http.StatusPartialContent:
		problem = "answered " + resp.Status + ": it, or a proxy before it, has no ranges"
	case got != want && got != fmt.Sprintf("bytes %d-%d/*", offset, offset+length-1):
		problem = fmt.Sprintf("answered with %.80q, not %q", got, want)
	case resp.ContentLength >= 0 && resp.ContentLength != length:
		problem = fmt.Sprintf("answered with %d bytes, not %d", resp.ContentLength, length)
	case resp.Header.Get("Content-Encoding") != "" && resp.Header.Get("Content-Encoding") != "identity":
		problem = fmt.Sprintf("answered with Content-Encoding %.40q", resp.Header.Get("Content-Encoding"))
	}
	if problem != "" {
		resp.Body.Close()
		return nil, &rangeError{host, problem}
	}
	return &exactBody{resp.Body, length}, nil
}

// exactBody is a body of so many bytes.
type exactBody struct {
	io.ReadCloser
	left int64
}

func (b *exactBody) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, io.EOF
	}
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	if errors.Is(err, io.EOF) {
		err = nil
		if b.left > 0 {
			err = fmt.Errorf("the registry's answer lacks %d bytes: %w", b.left, io.ErrUnexpectedEOF)
		}
	}
	return n, err
}
