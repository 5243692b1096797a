package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/image/transport"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/regular"
	"github.com/ctrlplane/pilot/keyprovider/brokerconfig"
	"github.com/ctrlplane/pilot/processor"
)

var rewrapCommand = &cli.Command{
	Name:      "rewrap",
	Usage:     "wrap an image's layer keys for other KEKs or recipients, without its layers",
	ArgsUsage: "<image> [<new name>] | <image or pattern> ...",
	Description: `Unwraps the layer keys of an encrypted image and wraps them again. Only the image's
annotations change, so no layer is read and it does not matter how large they are.
The image's digest changes, so it has to be signed again.

Without --from, --recipient and --remove, the keys are wrapped for the same KEKs in
their current versions. An image that has those already stays as it is. This needs
all of the image's KEKs; --from KEK --to KEK, which may be the same, leaves other
recipients as they are. Keys that the original pilot wrapped do not name their KEK, so
they need --from too.

Several images each keep their names. Three or more may be named, or --file lists
them, or a pattern matches them: * is any characters, slashes too, and ? is one.
In a registry, patterns are for tags, and in a directory for the names in it. An image
that fails does not stop the others.

The name stands for the image before or for the new one, and for nothing in between.
In a registry or a directory only manifests change. A new name may be elsewhere: layers
are copied there as they are, or mounted from another repository of the registry. An
archive is written anew. An image named by its digest takes a new name.

Signatures and the like that the registry or the directory has about the image are named.
Those about manifests that do not change are kept; the others do not sign the new image.

--registry is for names without docker://.
` + transportsHelp + keyProvidersHelp + credentialsHelp + `
Examples:
   ctr-pilot images rewrap app:1
   ctr-pilot images rewrap --from team-a --to team-b app:1 app:1-b
   ctr-pilot images rewrap docker://registry.example.com/app:1
   ctr-pilot images rewrap --remove provider:pilot:team-c 'docker://registry.example.com/app:*'
   ctr-pilot images rewrap --from ci --to prod oci:app:1 docker://registry.example.com/app:1`,
	Flags: slices.Concat([]cli.Flag{
		&cli.StringFlag{Name: "from", Usage: "`KEK` to replace"},
		&cli.StringFlag{Name: "to", Usage: "`KEK` that replaces it"},
		&cli.StringSliceFlag{Name: "recipient", Usage: "`RECIPIENT` to add; may be repeated"},
		&cli.StringSliceFlag{Name: "remove", Usage: "`RECIPIENT` to remove: provider:NAME:KEK, or provider:NAME, jwe, pkcs7, pgp or pkcs11 for all of that kind; may be repeated"},
		&cli.StringFlag{Name: "file", Usage: "`FILE` that lists images, one on each line, - for standard input; # begins a comment"},
		&cli.BoolFlag{Name: "dry-run", Usage: "show what would be done; keys are unwrapped and wrapped, and nothing is written"},
		&cli.BoolFlag{Name: "registry", Usage: "the images are in a registry, as with docker:// before their names"},
		&cli.BoolFlag{Name: "json", Usage: "print JSON"},
		&cli.DurationFlag{Name: "image-timeout", Value: 5 * time.Minute, Usage: "`TIME` that each of several images may take, so that one does not hold up the others"},
	}, selectionFlags("rewrap"), keyFlags(), brokerconfig.Flags(), registryFlags()),
	DisableSliceFlagSeparator: true,
	Action: func(ctx context.Context, cmd *cli.Command) error {
		r, err := newRewrapper(cmd)
		if err != nil {
			return err
		}
		names := r.parsed()
		if err := checkRegistryFlags(cmd, "--registry and images named docker://…", names...); err != nil {
			return err
		}
		if err := readPassword(cmd); err != nil {
			return err
		}
		return withPlaces(ctx, cmd, names, r.run)
	},
}

// rewrapper is one rewrap command.
type rewrapper struct {
	cmd     *cli.Command
	how     image.Rewrapping
	changes bool // of recipients are asked for
	opts    image.Options
	names   []string // of images, or patterns
	newName string
	several bool
}

// newRewrapper checks the flags and arguments before anything is done.
func newRewrapper(cmd *cli.Command) (_ *rewrapper, err error) {
	r := &rewrapper{cmd: cmd, how: image.Rewrapping{From: cmd.String("from"), To: cmd.String("to"), DryRun: cmd.Bool("dry-run")}}
	if err := checkKeyProviders(cmd); err != nil {
		return nil, err
	}
	if (r.how.From == "") != (r.how.To == "") {
		return nil, exit.Usagef("--from and --to must be used together")
	}
	for _, flag := range []string{"from", "to"} {
		if kek := cmd.String(flag); strings.HasPrefix(kek, "provider:") {
			return nil, exit.Usagef("--%s %s: it takes a KEK, as in --from team-a --to team-b; --remove and --recipient take recipients", flag, kek)
		}
	}
	if cmd.Duration("image-timeout") <= 0 {
		return nil, exit.Usagef("--image-timeout takes a time of more than 0, as in 5m")
	}
	if r.opts, err = selection(cmd); err != nil {
		return nil, err
	}
	for _, s := range cmd.StringSlice("remove") {
		rec, err := image.ParseRecipient(s)
		if err != nil {
			return nil, fmt.Errorf("--remove: %w", err)
		}
		r.how.Remove = append(r.how.Remove, rec)
	}
	if r.cmd.String("file") == "-" && cmd.Bool("password-stdin") {
		return nil, exit.Usagef("--file - and --password-stdin both read standard input")
	}
	if err := r.images(); err != nil {
		return nil, err
	}
	if len(cmd.StringSlice("recipient")) > 0 {
		args := keyArguments(cmd)
		args.Key, args.DecRecipient = nil, nil
		to, err := newRecipients(cmd, args, nil)
		if err != nil {
			return nil, err
		}
		r.how.Add = to.Parameters
	}
	r.changes = r.how.From != "" || r.how.Add != nil || len(r.how.Remove) > 0
	dc, err := decryptConfig(cmd, nil)
	r.how.Keys = withProviders(cmd, dc)
	return r, err
}

// images reads the images from the arguments and the file.
func (r *rewrapper) images() error {
	r.names = r.cmd.Args().Slice()
	file := r.cmd.String("file")
	r.several = file != "" || len(r.names) > 2 || slices.ContainsFunc(r.names, r.isPattern)
	if file != "" {
		listed, err := listedIn(file)
		if err != nil {
			return err
		}
		r.names = append(r.names, listed...)
	}
	if len(r.names) == 0 && file == "" {
		return exit.Usagef("rewrap takes the name of an image and a new name, or several images")
	}
	if !r.several && len(r.names) == 2 {
		r.names, r.newName = r.names[:1], r.names[1]
	}
	return nil
}

// listedIn reads the names of images in a file, or in standard input for "-".
func listedIn(file string) ([]string, error) {
	in := io.Reader(os.Stdin)
	if file != "-" {
		f, err := regular.Open(file)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	var names []string
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		line, _, _ := strings.Cut(lines.Text(), "#")
		if line = strings.TrimSpace(line); line != "" {
			names = append(names, line)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return names, nil
}

// parse reads the name of an image, which is in a registry with --registry.
func (r *rewrapper) parse(name string) (transport.Name, error) {
	return parseName(r.spelled(name))
}

// spelled returns a name with its transport, if that is a registry.
func (r *rewrapper) spelled(name string) string {
	const prefix = transport.Registry + "://"
	if r.cmd.Bool("registry") && !strings.HasPrefix(name, prefix) {
		return prefix + name
	}
	return name
}

// parsed returns the names that can be read. Those that can't fail by themselves.
func (r *rewrapper) parsed() []transport.Name {
	var all []transport.Name
	for _, name := range append(slices.Clone(r.names), r.newName) {
		if n, err := r.parse(name); err == nil && name != "" {
			all = append(all, n)
		}
	}
	return all
}

// run rewraps the image or the images.
func (r *rewrapper) run(ctx context.Context, p *places) error {
	if r.several {
		return r.all(ctx, p)
	}
	name, start := r.names[0], time.Now()
	out, err := r.one(ctx, p, name, r.newName)
	if err == nil {
		err = r.unfit(out.Rewrapped)
	}
	if r.newName != "" && err == nil {
		name = r.newName
	}
	if r.cmd.Bool("json") {
		if err := printJSON([]rewrapResult{r.result(name, out, start, err)}); err != nil {
			return err
		}
	} else if err == nil {
		fmt.Println(r.line(name, out, start))
	}
	if err != nil {
		return fmt.Errorf("rewrap %s: %w", name, err)
	}
	return nil
}

// unfit returns an error if the request can't have been meant for this image.
func (r *rewrapper) unfit(out image.Rewrapped) error {
	if out.Encrypted == 0 && r.changes {
		return errors.New("it has no encrypted layers")
	}
	if len(out.Missing) == 0 {
		return nil
	}
	had := make([]string, len(out.Had))
	for i, rec := range out.Had {
		had[i] = shown(rec.String())
	}
	return fmt.Errorf("no layer has the recipient %s, only %s", strings.Join(out.Missing, ", "), strings.Join(had, ", "))
}

// rewrapped is what became of one image.
type rewrapped struct {
	image.Rewrapped
	finished
}

// one rewraps an image, unless the outcome is unfit and it is the only one.
func (r *rewrapper) one(ctx context.Context, p *places, name, newName string) (_ rewrapped, err error) {
	if newName == "" {
		newName = name
	}
	from, err := r.parse(name)
	if err != nil {
		return rewrapped{}, err
	}
	to, err := r.parse(newName)
	if err != nil {
		return rewrapped{}, err
	}
	j, err := p.open(ctx, from, to, false)
	if taken := (*takenError)(nil); errors.As(err, &taken) {
		// It may have been meant as the second of two images.
		err = fmt.Errorf("image %s already exists: remove it first, or use --file or a pattern to rewrap both", newName)
	}
	if err != nil {
		return rewrapped{}, err
	}
	defer func() { err = errors.Join(err, j.close()) }()
	out := rewrapped{}
	out.Rewrapped, err = image.Rewrap(ctx, j, j.desc, r.how, r.opts)
	if errors.Is(err, processor.ErrNoKey) {
		out.Rewrapped, err = r.withPGP(ctx, j, err)
	}
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return rewrapped{}, err
	}
	warnSkipped(out.Skipped, absent(from))
	warnLacking(out.Lacking)
	unfit := !r.several && r.unfit(out.Rewrapped) != nil
	same := to == from && out.Target.Digest == j.desc.Digest
	if r.how.DryRun || unfit || same {
		return out, nil
	}
	if out.finished, err = j.finish(ctx, out.Result, false); err != nil {
		return rewrapped{}, err
	}
	out.printReferrers()
	return out, nil
}

// absent returns why a manifest may be missing, for a warning.
func absent(n transport.Name) string {
	switch n.Transport {
	case transport.Containerd:
		return "its content is not here (pull it with --all-platforms)"
	case transport.Registry:
		return "it is not in the registry"
	}
	return "its content is not in " + n.Path
}

// withPGP rewraps an image with keys in gpg's keyring, which may ask for their
// passwords, if there is such a recipient. Without them it failed.
func (r *rewrapper) withPGP(ctx context.Context, j *job, failed error) (image.Rewrapped, error) {
	layers, err := layerDescriptors(ctx, j, j.desc, r.opts)
	if err != nil {
		return image.Rewrapped{}, err
	}
	if !slices.ContainsFunc(layers, hasPGP) {
		return image.Rewrapped{}, failed
	}
	dc, err := decryptConfig(r.cmd, layers)
	if err != nil {
		return image.Rewrapped{}, err
	}
	how := r.how
	how.Keys = withProviders(r.cmd, dc)
	return image.Rewrap(ctx, j, j.desc, how, r.opts)
}
