package docker

import (
	"fmt"

	"github.com/ctrlplane/pilot/node/containerd"
)

// namespace is containerd's namespace of Docker's images.
const namespace = "moby"

const restartDocker = "systemctl restart docker.service"

// Advice says whether Docker decrypts images with the pilot of the containerd at socket,
// and if not, how to fix that, in order.
func (d *Engine) Advice(socket string) (detail string, fix []string) {
	name := "Docker"
	if d.Version != "" {
		name += " " + d.Version
	}
	switch {
	case d.major > 0 && d.major < 23:
		return name + " has no containerd image store: it can't pull encrypted images", []string{"upgrade Docker to 29"}
	case d.Store == "":
		return name + ": unknown image store: it pulls encrypted images only with the containerd image store", []string{"docker info --format '{{.DriverStatus}}'"}
	case d.Store == GraphDriverStore:
		set := fmt.Sprintf(`set "features": {"%s": true} in %s`, snapshotterFeature, d.ConfigFile)
		if d.graphDriverSet() {
			set += fmt.Sprintf(`, and remove storage-driver %q there and from dockerd's arguments`, d.storageDriver)
		}
		return fmt.Sprintf("%s uses its graph-driver store (%s): it can't pull encrypted images. "+
			"After switching to the containerd image store it does not see its present images and containers", name, d.StoreReason), []string{set, restartDocker}
	case d.OwnContainerd:
		fix := []string{"systemctl enable --now containerd.service", restartDocker}
		if !d.hasContainerd {
			fix = append([]string{"install containerd, such as Docker's package containerd.io"}, fix...)
		}
		if d.embedded {
			fix = append([]string{fmt.Sprintf("remove features.%s from %s", embeddedFeature, d.ConfigFile)}, fix...)
		}
		return fmt.Sprintf("%s starts its own containerd at %s, which can't be configured: it can't pull encrypted images", name, d.Containerd), fix
	case !containerd.SameSocket(d.Containerd, socket):
		return fmt.Sprintf("%s uses the containerd at %s, and pilot serves the one at %s: it can't pull encrypted images", name, d.Containerd, socket),
			[]string{fmt.Sprintf(`set "containerd": %q in %s, or in dockerd's arguments`, socket, d.ConfigFile), restartDocker}
	}
	return fmt.Sprintf("%s uses this containerd (namespace %s) with its containerd image store: encrypted images work", name, namespace), nil
}
