package plugin_test

import (
	"log"
	"net"

	"github.com/ctrlplane/pilot/plugin"
	"github.com/ctrlplane/pilot/processor"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
	"github.com/ctrlplane/pilot/processor/ocicryptclient/grpcdial"
)

// Run a differ as containerd's proxy plugin of type diff, with the key providers of an
// ocicrypt.conf.
func ExampleNewServer() {
	containerd, err := plugin.Dial("/run/containerd/containerd.sock")
	if err != nil {
		log.Fatal(err)
	}
	defer containerd.Close()
	providers, err := ocicryptclient.FromFile("/etc/pilot/ocicrypt.conf", grpcdial.Call)
	if err != nil {
		log.Fatal(err)
	}
	l, err := net.Listen("unix", "/run/pilot/diff.sock") // in a directory that is root's
	if err != nil {
		log.Fatal(err)
	}
	s := plugin.NewServer(containerd, plugin.Config{Keys: processor.Keys{Providers: providers}})
	log.Fatal(s.Serve(l))
}
