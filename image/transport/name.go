package transport

import (
	"errors"
	"fmt"
	"runtime"
	"strings"

	"github.com/containerd/containerd/v2/pkg/reference"
)

// The transports.
const (
	Registry      = "docker"
	OCI           = "oci"
	OCIArchive    = "oci-archive"
	DockerArchive = "docker-archive"
	Containerd    = "containerd"
)

// Name is the name of an image somewhere.
type Name struct {
	Transport string
	Path      string // of a file or directory
	Image     string // in there, or in the registry, or in containerd
}

// ErrName is wrapped by the error of a name that can't be read.
var ErrName = errors.New("bad image name")

// Parse reads a name. One without a transport is that of an image in containerd.
func Parse(s string) (Name, error) {
	transport, rest, _ := strings.Cut(s, ":")
	n := Name{Transport: transport}
	switch transport {
	case Registry:
		ref, ok := strings.CutPrefix(rest, "//")
		if !ok {
			return Name{}, fmt.Errorf("%w: %q: a registry's is docker://REGISTRY/REPOSITORY:TAG", ErrName, s)
		}
		spec, err := reference.Parse(ref)
		if err != nil || spec.Object == "" || !strings.Contains(spec.Locator, "/") {
			return Name{}, fmt.Errorf("%w: %q: it takes a registry, a repository and a tag, as in docker://registry.example.com/app:1", ErrName, s)
		}
		n.Image = ref
	case OCI, OCIArchive, DockerArchive:
		n.Path, n.Image = splitPath(rest, runtime.GOOS == "windows")
		if n.Path == "" {
			return Name{}, fmt.Errorf("%w: %q: it has no path", ErrName, s)
		}
	case Containerd:
		n.Image = rest
	default:
		n = Name{Transport: Containerd, Image: s}
	}
	if n.Transport == Containerd && n.Image == "" {
		return Name{}, fmt.Errorf("%w: %q: it names no image", ErrName, s)
	}
	return n, nil
}

// splitPath splits PATH:IMAGE at the first colon that is not that of a drive.
func splitPath(s string, drives bool) (file, image string) {
	drive := ""
	if drives && len(s) > 2 && s[1] == ':' && (s[2] == '\\' || s[2] == '/') {
		drive, s = s[:2], s[2:]
	}
	file, image, _ = strings.Cut(s, ":")
	return drive + file, image
}

func (n Name) String() string {
	s := n.Transport + ":"
	switch {
	case n.Transport == Registry:
		return s + "//" + n.Image
	case n.Transport == Containerd:
		return s + n.Image
	case n.Image != "":
		return s + n.Path + ":" + n.Image
	}
	return s + n.Path
}
