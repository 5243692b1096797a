package validate

import (
	"crypto/sha256"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write what is made from the chart")

const sums = "../chart.sum"

// TestManifestsFitTheChart compares the chart and kustomize's manifests with their digests
// as they were when the manifests were made, which needs no Helm.
func TestManifestsFitTheChart(t *testing.T) {
	var now strings.Builder
	for _, dir := range []string{"chart", "pilot", "copilot", "admission"} {
		err := filepath.WalkDir("../"+dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			content, err := os.ReadFile(path)
			fmt.Fprintf(&now, "%x  %s\n", sha256.Sum256(content), strings.TrimPrefix(path, "../"))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if *update {
		if err := os.WriteFile(sums, []byte(now.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(sums)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(now.String()) {
		if !strings.Contains(string(want), line) {
			t.Errorf("%s changed: run \"make manifests\"", strings.TrimSpace(line[66:]))
		}
	}
	if now.Len() != len(want) {
		t.Error("files came or went: run \"make manifests\"")
	}
}

// TestReleaseArchivesWhatExists looks for what a release's archive is to have: "make release"
// ends at a path that has moved.
func TestReleaseArchivesWhatExists(t *testing.T) {
	const repo = "../../../"
	script, err := os.ReadFile(repo + "scripts/release.sh")
	if err != nil {
		t.Fatal(err)
	}
	_, args, _ := strings.Cut(string(script), "git archive ")
	_, args, _ = strings.Cut(args, " HEAD ")
	args, _, _ = strings.Cut(args, " |")
	paths := strings.Fields(args)
	if !slices.Contains(paths, "packaging/kubernetes") {
		t.Fatalf("it archives %q", paths)
	}
	for _, path := range paths {
		if _, err := os.Stat(repo + path); err != nil {
			t.Error(err)
		}
	}
}

// TestCopilotHasRoomForBackups requires that a backup of 100,000 KEKs, which has 20 MB, fits
// where copilot makes it.
func TestCopilotHasRoomForBackups(t *testing.T) {
	manifest, err := os.ReadFile("../copilot/deployment.yaml")
	if err != nil {
		t.Fatal(err)
	}
	size := regexp.MustCompile(`- name: state\n +emptyDir:\n +medium: Memory\n +sizeLimit: (\d+)Mi\n`).FindSubmatch(manifest)
	if size == nil {
		t.Fatal("there is no volume for its state")
	}
	if n, err := strconv.Atoi(string(size[1])); err != nil || n < 64 {
		t.Errorf("it has %d MiB, %v", n, err)
	}
}
