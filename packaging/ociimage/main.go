// Command ociimage writes a container image of static programs and nothing
// else, for several architectures, as an OCI layout. The same programs give the
// same image.
package main

import (
	"archive/tar"
	"bytes"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

func main() {
	var i image
	out := flag.String("out", "", "`directory` of the layout, which is replaced")
	flag.StringVar(&i.user, "user", "65532:65532", "user and group to run as")
	flag.StringVar(&i.version, "version", "dev", "version")
	flag.StringVar(&i.revision, "revision", "", "commit")
	created := flag.Int64("created", 0, "when the commit was made, in `seconds` since 1970")
	flag.StringVar(&i.description, "description", "", "one sentence")
	flag.StringVar(&i.license, "license", "LICENSE", "`file` with the license")
	flag.BoolVar(&i.roots, "roots", false, "put in the CA certificates that Mozilla trusts")
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), `usage: ociimage [flags] PROGRAM,... ARCH=DIRECTORY...

The first program is the entry point. Example:
   ociimage -out dist/images/pilot -user 0 pilot,pilot-decoder amd64=bin/amd64 arm64=bin/arm64

`)
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() < 2 || *out == "" {
		flag.Usage()
		os.Exit(2)
	}
	i.created = time.Unix(*created, 0).UTC()
	i.programs = strings.Split(flag.Arg(0), ",")
	if err := i.write(*out, flag.Args()[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "ociimage:", err)
		os.Exit(1)
	}
}

// image is what the images for all architectures have in common.
type image struct {
	programs                                      []string
	user, version, revision, description, license string
	created                                       time.Time
	roots                                         bool
}

// write writes the layout: an index of an image for each ARCH=DIRECTORY.
func (i image) write(out string, archs []string) error {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, s := range archs {
		arch, dir, ok := strings.Cut(s, "=")
		if !ok {
			return fmt.Errorf("%s is not ARCH=DIRECTORY", s)
		}
		img, err := i.build(arch, dir)
		if err != nil {
			return fmt.Errorf("%s: %w", arch, err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{
			Platform: &v1.Platform{OS: "linux", Architecture: arch},
		}})
	}
	index = mutate.Annotations(index, i.labels()).(v1.ImageIndex)
	if err := os.RemoveAll(out); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return err
	}
	l, err := layout.Write(out, empty.Index)
	if err != nil {
		return err
	}
	if err := l.AppendIndex(index, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": i.version})); err != nil {
		return err
	}
	digest, err := index.Digest()
	if err != nil {
		return err
	}
	fmt.Printf("%s:%s@%s\n", out, i.version, digest)
	return nil
}

func (i image) labels() map[string]string {
	return map[string]string{
		"org.opencontainers.image.title":       i.programs[0],
		"org.opencontainers.image.description": i.description,
		"org.opencontainers.image.version":     i.version,
		"org.opencontainers.image.revision":    i.revision,
		"org.opencontainers.image.created":     i.created.Format(time.RFC3339),
		"org.opencontainers.image.licenses":    "GPL-3.0-only",
		"org.opencontainers.image.source":      "https://github.com/ctrlplane/pilot",
	}
}

// build returns the image for an architecture, with programs from dir.
func (i image) build(arch, dir string) (v1.Image, error) {
	content, err := i.tar(dir)
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil },
		tarball.WithMediaType(types.OCILayer), tarball.WithCompressedCaching)
	if err != nil {
		return nil, err
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err = mutate.Append(img, mutate.Addendum{Layer: layer, History: v1.History{Created: v1.Time{Time: i.created}, CreatedBy: "ociimage"}})
	if err != nil {
		return nil, err
	}
	return mutate.ConfigFile(img, i.config(arch, img))
}

func (i image) config(arch string, img v1.Image) *v1.ConfigFile {
	had, err := img.ConfigFile()
	if err != nil {
		panic(err) // it is in memory
	}
	conf := had.DeepCopy()
	conf.OS, conf.Architecture, conf.Created = "linux", arch, v1.Time{Time: i.created}
	conf.Config = v1.Config{User: i.user, Entrypoint: []string{"/usr/bin/" + i.programs[0]}, WorkingDir: "/", Labels: i.labels()}
	return conf
}

// tar returns the layer: the programs, the license, and directories and
// certificates that they need.
func (i image) tar(dir string) ([]byte, error) {
	files := map[string][]byte{}
	for _, name := range i.programs {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		files["usr/bin/"+name] = b
	}
	license, err := os.ReadFile(i.license)
	if err != nil {
		return nil, err
	}
	files["usr/share/doc/"+i.programs[0]+"/LICENSE"] = license
	if i.roots {
		var pems bytes.Buffer
		for root := range bundle.Roots() {
			if root.Constraint != nil {
				continue // a file can't say it
			}
			pem.Encode(&pems, &pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate})
		}
		files["etc/ssl/certs/ca-certificates.crt"] = pems.Bytes()
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	var errs []error
	dirs := map[string]bool{".": true}
	var names []string
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		var above []string
		for d := path.Dir(name); !dirs[d]; d = path.Dir(d) {
			dirs[d] = true
			above = append(above, d)
		}
		for _, d := range slices.Backward(above) {
			errs = append(errs, w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d + "/", Mode: 0o755, ModTime: i.created}))
		}
		mode := int64(0o644)
		if strings.HasPrefix(name, "usr/bin/") {
			mode = 0o755
		}
		errs = append(errs, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(files[name])), Mode: mode, ModTime: i.created}))
		_, err := w.Write(files[name])
		errs = append(errs, err)
	}
	errs = append(errs, w.Close())
	return out.Bytes(), errors.Join(errs...)
}
