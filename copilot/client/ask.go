package client

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/internal/errline"
)

// candidate is a broker in one call.
type candidate struct {
	*endpoint
	avoided  bool          // since it failed
	distance time.Duration // in time
	tries    int
	err      error     // why the last one failed
	retry    retry     // whether another may help
	again    time.Time // and when at the earliest
}

// ask sends a request to the brokers, the nearest first, until accept takes an answer.
// A broker's decision about the KEK or this client is final. If a broker gives no
// usable answer, ask tries the next one, and after the last starts over if a retry may
// help. It takes no longer than the client's timeout, which the brokers share.
func (c *Client) ask(ctx context.Context, r request, accept func(answer []byte) error) error {
	caller := ctx
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	if c.token != nil && !r.byCertificate {
		var err error
		if r.authorization, err = c.token.authorization(ctx); err != nil {
			// It may be in the middle of being replaced.
			return fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
	}
	deadline, _ := ctx.Deadline()

	all := c.nearest()
	left := slices.Clone(all)
	rounds := backOff{most: c.rounds}
	for {
		for i, b := range left {
			if ctx.Err() != nil {
				break
			}
			if time.Now().Before(b.again) {
				continue
			}
			share := time.Until(deadline) / time.Duration(len(left)-i)
			retry, err := b.once(ctx, min(c.try, share), r, accept)
			b.tries++
			if err == nil {
				b.succeeded()
				return nil
			}
			if !retry.possible && !errors.Is(err, ErrUnavailable) {
				b.succeeded()
				return fmt.Errorf("%s: %w", b, err)
			}
			if errors.Is(caller.Err(), context.Canceled) {
				return fmt.Errorf("%s: %w", b, err)
			}
			if b.tries == 1 {
				b.failed()
			}
			if b.err == nil || ctx.Err() == nil { // else its earlier error says more than that time ran out
				b.err = err
			}
			b.retry, b.again = retry, time.Now().Add(retry.after)
		}
		left = slices.DeleteFunc(left, func(b *candidate) bool { return !b.retry.possible })
		if len(left) == 0 {
			return unavailable(all)
		}
		next := slices.MinFunc(left, func(a, b *candidate) int { return a.again.Compare(b.again) })
		if !rounds.wait(ctx, time.Until(next.again)) {
			return unavailable(all)
		}
	}
}

// unavailable says why each broker gave no usable answer.
func unavailable(all []*candidate) error {
	errs := make([]error, len(all))
	for i, b := range all {
		err := b.err
		switch {
		case err == nil:
			err = fmt.Errorf("%w: no time was left to ask it", ErrUnavailable)
		case !errors.Is(err, ErrUnavailable):
			err = fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		if strings.HasPrefix(b.url, "unix:") && errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: start copilot on this machine, or set broker to its address", err)
		}
		if b.retry.possible {
			err = fmt.Errorf("%w (tried %d times)", err, b.tries)
		}
		errs[i] = fmt.Errorf("%s: %w", b, err)
	}
	return errline.Join(errs...)
}
