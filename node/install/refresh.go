package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/host"
)

// refreshTimeout bounds a Refresh, which systemd runs within a service's start timeout:
// 90 seconds by default, 45 on Fedora.
const refreshTimeout = 30 * time.Second

// Refresh updates pilot's part of containerd's configuration right before containerd
// starts: the configuration may have been rewritten without pilot, tools in pilot's lists
// may have been added or removed, or containerd may have another version or path. It
// returns the files that it has changed, and does nothing if pilot is not installed.
//
// If pilot can't be added without losing other settings, Refresh empties its drop-in, so
// that containerd starts without pilot, and the error says why. On a node that asks about
// workloads, what makes containerd ask stays there, unless that doesn't fit either. If
// containerd's program takes too long, nothing changes, nor if an installation was interrupted
// before its units were there.
func Refresh(ctx context.Context, o Options) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, refreshTimeout)
	defer cancel()
	// An installation that runs now updates it itself, and may be waiting for
	// containerd to start.
	release, err := o.tryLock()
	if err != nil || release == nil {
		return nil, err
	}
	defer release()
	s, lost, err := o.loadRecord()
	if err != nil {
		return nil, err
	}
	if lost != "" {
		return nil, &host.Conflict{Where: RecordFile, What: lost + ", and pilot's files are here", Fix: "run \"pilot node install\", which takes them over"}
	}
	if len(s.dropIns()) == 0 {
		return nil, nil
	}
	if unit := s.interrupted(o); unit != "" {
		return nil, &host.Conflict{Where: unit, What: "it is missing, and so is pilot's drop-in: an installation was interrupted", Fix: "run \"pilot node install\" or \"pilot node uninstall\""}
	}
	c, err := s.lookAgain(ctx, o)
	if err != nil {
		return nil, err // a fault of containerd, or it is gone
	}
	if o.PilotBinary, err = os.Executable(); err != nil {
		return nil, err
	}
	p := &Plan{options: o, inserted: make(map[string]string), containerd: c}
	if err = p.forRefresh(ctx, s); err == nil && (len(p.Changes) > 0 || s.moved(c)) {
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

// interrupted returns a file of a unit that is missing beside the drop-in, or "". The record is
// written before all other files and changed after them, so an installation that was killed
// may have neither: with a drop-in alone, containerd would ask a pilot that does not start.
func (s *record) interrupted(o Options) (missing string) {
	for _, f := range s.Files {
		isUnit := strings.HasPrefix(f.Path, host.UnitDir+"/")
		if !isUnit && !isDropIn(f.Path) {
			continue
		}
		_, err := o.Lstat(f.Path)
		switch {
		case !isUnit && err == nil:
			return ""
		case isUnit && errors.Is(err, fs.ErrNotExist):
			missing = f.Path
		}
	}
	return missing
}

// forRefresh plans pilot's part of containerd's configuration, and what that requires.
func (p *Plan) forRefresh(ctx context.Context, before record) error {
	if !p.onlyNRI {
		if err := p.options.checkDiffer(p.containerd); err != nil {
			return err
		}
	}
	// containerd's plugin_path may have changed, and containerd creates no container if it
	// requires a plugin that is not there.
	if p.containerd.Workloads {
		if err := p.nriPlugin(before); err != nil {
			return err
		}
	}
	return p.containerdFiles(ctx, before)
}

// checkDiffer returns a [host.Conflict] if this containerd would ask pilot's differ, and pilot
// serves none, since it was set up for containerd 1.6: every pull would fail, also of plain
// images.
func (o Options) checkDiffer(c *containerd.Instance) error {
	var conf struct {
		DiffListen string `toml:"diff-listen"`
	}
	text, err := o.ReadFile(pilotConfig)
	if !c.UsesDiffer() || err != nil || toml.Unmarshal(text, &conf) != nil || conf.DiffListen != "off" {
		return nil
	}
	return &host.Conflict{Where: pilotConfig, What: fmt.Sprintf("pilot was set up for containerd 1.6, and serves no differ, which containerd %d.%d needs", c.Major, c.Minor), Fix: "run \"pilot node install --now\""}
}

// leaveOut takes pilot's differ out of the drop-in after the error why, if containerd would
// lose settings with it or not start. What makes containerd ask pilot's NRI plugin about
// each container stays, if that fits. leaveOut does not remove the file: containerd's
// configuration may import it by name.
func leaveOut(ctx context.Context, c *containerd.Instance, o Options, before record, why error) error {
	dump, err := c.Dump(ctx, o.Host)
	if ctx.Err() != nil || c.Deferred() {
		return staysAsItWas(why)
	}
	harmless := err == nil && len(containerd.Differences(c.Plain, dump, c.SetByPilot())) == 0
	missing := ""
	if c.Workloads {
		if harmless {
			missing = c.NotAsking(dump)
		}
		if !harmless || missing != "" {
			p := &Plan{options: o, inserted: make(map[string]string), containerd: c, onlyNRI: true}
			if p.forRefresh(ctx, before) == nil && p.apply(ctx, nil) == nil {
				return fmt.Errorf("containerd starts without pilot's differ, and can't decrypt images until \"pilot node install\" works; it still asks pilot about each container: %w", why)
			}
			if ctx.Err() != nil {
				return staysAsItWas(why)
			}
			if !harmless {
				missing = c.NotAsking(c.Plain)
			}
		}
	}
	if missing != "" {
		why = fmt.Errorf("%s: %w", missing, why)
	}
	if harmless {
		return staysAsItWas(why)
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

func staysAsItWas(why error) error {
	return fmt.Errorf("pilot's drop-in of containerd's configuration stays as it was: %w", why)
}

// leftOut is the first line of a drop-in without pilot's differ.
const leftOut = "# Emptied by \"pilot node refresh\": \"pilot node install\" says why, and fills it again.\n"
