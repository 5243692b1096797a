package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"

	containerd "github.com/containerd/containerd/v2/client"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/exit"
)

// layerRange is a number of --layer, or the first and the last of several.
var layerRange = regexp.MustCompile(`^(-?\d{1,4})(?:-(-?\d{1,4}))?$`)

// parseLayers reads the values of --layer: 3, -1, 2-5, -3--1, or several of those with
// commas between them.
func parseLayers(values []string) ([]int, error) {
	var list []int
	for _, value := range values {
		for part := range strings.SplitSeq(value, ",") {
			m := layerRange.FindStringSubmatch(part)
			if m == nil {
				return nil, exit.Usagef("--layer %s: %q is no layer: use a number, as in 2 or -1, a range, as in 2-5, or several, as in 0,2-5", value, part)
			}
			first, _ := strconv.Atoi(m[1]) // four digits
			last := first
			if m[2] != "" {
				last, _ = strconv.Atoi(m[2])
			}
			if last < first || first < 0 && last >= 0 {
				return nil, exit.Usagef("--layer %s: a range takes the lower number first, and both count from the same end, as in 2-5 or -3--1", value)
			}
			for n := first; n <= last; n++ {
				list = append(list, n)
			}
		}
	}
	return list, nil
}

var allButBaseFlag = &cli.StringFlag{
	Name:  "all-but-base",
	Usage: "encrypt the layers that `IMAGE`, which the image was built on, does not have; it is in containerd or in its registry",
}

// baseLayers returns the layers of the image that --all-but-base names.
func baseLayers(ctx context.Context, client *containerd.Client, cmd *cli.Command) ([]ocispec.Descriptor, error) {
	name := cmd.String("all-but-base")
	if name == "" {
		return nil, nil
	}
	if len(cmd.StringSlice("layer")) > 0 {
		return nil, exit.Usagef("--layer and --all-but-base are mutually exclusive")
	}
	layers, err := layersOf(ctx, client, cmd, name)
	if err == nil && len(layers) == 0 {
		err = errors.New("it has no layers")
	}
	if err != nil {
		return nil, fmt.Errorf("--all-but-base %s: %w", name, err)
	}
	return layers, nil
}

// warnLacking reports selected layers that some manifest does not have.
func warnLacking(lacking []string) {
	for _, l := range lacking {
		fmt.Fprintf(os.Stderr, "ctr-pilot: warning: %s\n", shownText(l))
	}
}
