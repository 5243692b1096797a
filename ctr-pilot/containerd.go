package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/cmd/ctr/commands"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	"github.com/urfave/cli/v3"
)

// withClient calls do with a client of the containerd that the command names,
// under a lease and until a signal.
func withClient(ctx context.Context, cmd *cli.Command, do func(context.Context, *containerd.Client) error) (err error) {
	ctx, stop := untilSignal(ctx)
	defer stop()
	client, ctx, cancel, err := commands.NewClient(ctx, cmd)
	if err != nil {
		return &connectError{err}
	}
	defer cancel()
	ctx, release, err := withLease(ctx, client)
	if err != nil {
		return err
	}
	defer func() { release(err) }()
	return do(ctx, client)
}

// connectError is the error of a containerd that can't be reached.
type connectError struct{ err error }

func (e *connectError) Error() string { return e.err.Error() }

func (e *connectError) Unwrap() error { return e.err }

// untilSignal returns a context that is done when the user stops the command.
func untilSignal(ctx context.Context) (context.Context, context.CancelFunc) {
	return signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
}

// leaseTTL bounds how long containerd keeps what a killed command left behind.
const leaseTTL = 6 * time.Hour

// withLease returns a context with a lease that keeps content, and a function that ends
// the lease. If the work failed, the function waits until what was written is gone.
func withLease(ctx context.Context, client *containerd.Client) (context.Context, func(error), error) {
	service := client.LeasesService()
	l, err := service.Create(ctx, leases.WithRandomID(), leases.WithExpiration(leaseTTL))
	if err != nil {
		return nil, nil, err
	}
	leased := leases.WithLease(ctx, l.ID)
	return leased, func(err error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
		defer cancel()
		var opts []leases.DeleteOpt
		if err != nil {
			opts = append(opts, leases.SynchronousDelete)
		}
		if err := service.Delete(ctx, l, opts...); err != nil && !errdefs.IsNotFound(err) {
			fmt.Fprintf(os.Stderr, "ctr-pilot: warning: delete lease %s: %v\n", l.ID, err)
		}
	}, nil
}

// namedByDigest reports whether a name holds a digest: NAME@DIGEST, or the digest of its
// configuration, as CRI names images.
func namedByDigest(name string) bool {
	return strings.Contains(name, "@") || strings.HasPrefix(name, "sha256:")
}
