//go:build packages

package harness

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// The versions of the packages that are built, the second to upgrade to.
const (
	PackageVersion = "1.2.3"
)

// Patiently returns a command that may take half an hour.
func Patiently(t testing.TB, name string, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Minute)
	t.Cleanup(cancel)
	return exec.CommandContext(ctx, name, args...)
}

// BuildPackages builds packages of the sources into dir.
func BuildPackages(t testing.TB, sources, dir, version, archs, formats string) {
	t.Helper()
	cmd := Patiently(t, filepath.Join(sources, "scripts/packages.sh"), dir)
	cmd.Env = append(os.Environ(), "VERSION=v"+version, "ARCHS="+archs, "FORMATS="+formats, "SOURCE_DATE_EPOCH=1800000000", "PILOT_TOOLS="+Tools)
	Output(t, cmd)
}

// PackageFile returns the path of a package for this machine.
func PackageFile(t testing.TB, dir, name, format string) string {
	t.Helper()
	pattern := name + "_*_" + Arch + ".deb"
	if format == "rpm" {
		pattern = name + "-[0-9]*." + map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[Arch] + ".rpm"
	}
	files, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil || len(files) != 1 {
		t.Fatalf("%s in %s: %v, %v", pattern, dir, files, err)
	}
	return files[0]
}

// Path returns where a file of the machine is.
func (b *BootedMachine) Path(name string) string { return filepath.Join(b.Root, name) }
