package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/internal/exit"
)

// selectionFlags choose layers of an image.
func selectionFlags(verb string) []cli.Flag {
	return []cli.Flag{
		&cli.StringSliceFlag{
			Name:  "layer",
			Usage: "`LAYER` to " + verb + ", counted from 0, or from -1 downwards for the topmost, or several, as in 2-5 or 0,2,-1; by default all",
		},
		&cli.StringSliceFlag{
			Name:  "platform",
			Usage: "`PLATFORM` to " + verb + ", such as linux/amd64; by default all",
		},
		&cli.BoolFlag{
			Name:  "all-platforms",
			Usage: verb + " all platforms; this is the default",
		},
	}
}

var errBothPlatforms = exit.Usagef("--platform and --all-platforms are mutually exclusive")

// selection returns the options for --layer and --platform.
func selection(cmd *cli.Command) (image.Options, error) {
	layers, err := parseLayers(cmd.StringSlice("layer"))
	if err != nil {
		return image.Options{}, err
	}
	opts := image.Options{Layers: layers}
	if cmd.Bool("all-platforms") && len(cmd.StringSlice("platform")) > 0 {
		return image.Options{}, errBothPlatforms
	}
	for _, s := range cmd.StringSlice("platform") {
		p, err := platforms.Parse(s)
		if err != nil {
			return image.Options{}, fmt.Errorf("--platform %s: %w", s, err)
		}
		opts.Platforms = append(opts.Platforms, p)
	}
	return opts, nil
}

func layerDescriptors(ctx context.Context, store image.Store, target ocispec.Descriptor, opts image.Options) ([]ocispec.Descriptor, error) {
	layers, err := image.Layers(ctx, store, target, opts)
	if err != nil {
		return nil, err
	}
	descs := make([]ocispec.Descriptor, len(layers))
	for i, l := range layers {
		descs[i] = l.Descriptor
	}
	return descs, nil
}

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
				return nil, exit.Usagef("--layer %s: %q is not a layer: use a number, as in 2 or -1, a range, as in 2-5, or several, as in 0,2-5", value, part)
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
func baseLayers(ctx context.Context, at workplace, cmd *cli.Command) ([]ocispec.Descriptor, error) {
	name := cmd.String("all-but-base")
	if name == "" {
		return nil, nil
	}
	if len(cmd.StringSlice("layer")) > 0 {
		return nil, exit.Usagef("--layer and --all-but-base are mutually exclusive")
	}
	layers, err := at.layersOf(ctx, name)
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
