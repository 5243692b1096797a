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
func Parse(s string) (Name, error) { return parse(s, runtime.GOOS == "windows") }

func parse(s string, windows bool) (Name, error) {
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
		n.Path, n.Image = splitPath(rest, windows)
		if n.Path == "" {
			return Name{}, fmt.Errorf("%w: %q: it has no path", ErrName, s)
		}
	case Containerd:
		n.Image = rest
	default:
		if windows && hasDrive(s) {
			return Name{}, fmt.Errorf("%w: %q: a path follows its transport, as in oci:%[2]s or oci-archive:%[2]s", ErrName, s)
		}
		n = Name{Transport: Containerd, Image: s}
	}
	if n.Transport == Containerd && n.Image == "" {
		return Name{}, fmt.Errorf("%w: %q: it names no image", ErrName, s)
	}
	return n, nil
}

// splitPath splits PATH:IMAGE at the first colon that is not that of a drive.
func splitPath(s string, windows bool) (file, image string) {
	n := 0
	if windows && strings.HasPrefix(s, `\\?\`) {
		n = 4
	}
	if windows && hasDrive(s[n:]) {
		n += 2
	}
	file, image, _ = strings.Cut(s[n:], ":")
	return s[:n] + file, image
}

// hasDrive reports whether a path begins with a drive and the root of it. Without the
// root, a letter is a directory: "oci:c:1" is image 1 in c, as elsewhere.
func hasDrive(s string) bool {
	return len(s) > 2 && s[1] == ':' && (s[2] == '\\' || s[2] == '/') && (s[0]|0x20 >= 'a' && s[0]|0x20 <= 'z')
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
