package install

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/host"
)

// refreshTimeout bounds a Refresh. systemd fails a service whose preparations take
// longer than the service may take to start, which is 90 seconds by default, 45 on
// Fedora.
const refreshTimeout = 30 * time.Second

// Refresh brings pilot's part of containerd's configuration up to date, right
// before containerd starts: the configuration may have been rewritten without
// pilot, tools may have come and gone that are in pilot's lists, or containerd may
// be another version or at another path. It returns the files that it has changed,
// and does nothing where pilot is not installed.
//
// If containerd can't be given pilot without losing something else, its drop-in is
// removed, so that containerd starts as if pilot was not there, and the error says
// why. If containerd's program takes too long, everything stays as it was.
func Refresh(ctx context.Context, o Options) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, refreshTimeout)
	defer cancel()
	// An installation that is at work has brought it up to date, and may be
	// what waits for containerd to start.
	release, err := o.tryLock()
	if err != nil || release == nil {
		return nil, err
	}
	defer release()
	s, lost, err := o.loadState()
	if err != nil {
		return nil, err
	}
	if lost != "" {
		return nil, &host.Conflict{Where: StateFile, What: lost + ", and pilot's files are here", Fix: "run \"pilot node install\", which takes them over"}
	}
	if len(s.dropIns()) == 0 {
		return nil, nil
	}
	c, err := s.lookAgain(ctx, o)
	if err != nil {
		return nil, err // of containerd's own, or it is gone
	}
	if o.PilotBinary, err = os.Executable(); err != nil {
		return nil, err
	}
	p := &Plan{options: o, inserted: make(map[string]string), containerd: c}
	moved := s.Containerd != nil && s.Containerd.Program != c.Program
	if err = p.containerdFiles(ctx, s); err == nil && (len(p.Changes) > 0 || moved) {
		err = p.apply(ctx, nil)
	}
	if err != nil {
		return nil, leaveOut(ctx, c, o, s, err)
	}
	var changed []string
	for _, change := range p.Changes {
		changed = append(changed, change.Path)
	}
	if _, config := containerd.StartedBy(o.Host, c.Service); c.Name == "" && config != "" && config != c.Config {
		return changed, &host.Conflict{Where: c.Service, What: fmt.Sprintf("its containerd reads %s now, and pilot was installed for %s", config, c.Config), Fix: "run \"pilot node install\""}
	}
	return changed, nil
}

// leaveOut empties pilot's drop-in if containerd would lose settings with it or not
// start, because of the error why. It does not remove it: containerd's configuration may import it by
// name.
func leaveOut(ctx context.Context, c *containerd.Instance, o Options, before state, why error) error {
	dump, err := c.Dump(ctx, o.Host)
	if ctx.Err() != nil || c.Deferred() || err == nil && len(containerd.Differences(c.Plain, dump, c.SetByPilot())) == 0 {
		return fmt.Errorf("pilot's drop-in of containerd's configuration stays as it was: %w", why)
	}
	p := &Plan{options: o, deferred: true}
	for _, path := range c.Ours {
		if err := p.own(before, path, []byte(leftOut), nil); err != nil {
			return fmt.Errorf("%w; %w", why, err)
		}
	}
	if err := p.apply(ctx, nil); err != nil {
		return fmt.Errorf("%w; %w", why, err)
	}
	return fmt.Errorf("containerd starts without pilot, and can't decrypt images until \"pilot node install\" works: %w", why)
}

const leftOut = "# Emptied by \"pilot node refresh\": \"pilot node install\" says why, and fills it again.\n"
