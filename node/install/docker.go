package install

import (
	"context"

	"github.com/ctrlplane/pilot/node/docker"
)

// DockerNote returns lines of text that say whether the machine's Docker decrypts images
// with the pilot that the plan installs, or nothing if there is no Docker.
func (p *Plan) DockerNote(ctx context.Context) (lines []string) {
	if p.containerd == nil {
		return nil // it installs beside CRI-O
	}
	d, err := docker.Find(ctx, p.options.Host)
	switch {
	case err != nil:
		return []string{err.Error()}
	case d == nil:
		return nil
	}
	detail, fix := d.Advice(p.containerd.Socket())
	if lines = append(lines, detail); len(fix) > 0 {
		lines[0] += "; for Docker to pull them:"
	}
	for _, f := range fix {
		lines = append(lines, "  "+f)
	}
	return lines
}
