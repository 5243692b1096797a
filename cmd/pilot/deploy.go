//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/node/daemonset"
)

// brokerFlags are the settings for pilot.toml that install and deploy take.
var brokerFlags = []string{"broker", "broker-ca", "broker-cert", "broker-key", "broker-token-file"}

var deployCommand = &cli.Command{
	Name:  "deploy",
	Usage: "install pilot from a pod of a DaemonSet, and keep it up to date",
	Description: `What the DaemonSet in packaging/kubernetes runs, in a privileged pod with
hostPID. It copies pilot and pilot-decoder to the node, runs "pilot node install
--now" there, and copies the pod's token to the node whenever it is renewed.
If it is stopped while the DaemonSet is being deleted, it runs "pilot node
uninstall --now", which removes all of this.

Example:
   pilot node deploy --broker https://10.96.0.200:8443 \
      --broker-ca-from /run/broker/ca.pem --broker-token-from /run/broker/token`,
	Flags: slices.Concat(containerdFlags(), settingFlags(), []cli.Flag{
		&cli.StringFlag{Name: "containerd-address", Usage: "`SOCKET` of the containerd to set up, where several run"},
		&cli.BoolFlag{Name: "lazy", Usage: "pull encrypted eStargz images lazily, with pilot's snapshotter; --lazy=false: no longer (default: as it is)"},
		&cli.BoolFlag{Name: "workloads", Usage: "have containerd ask pilot about each container whether its workload may use the image's KEKs; --workloads=false undoes that"},
		&cli.StringFlag{Name: "broker-ca-from", Usage: "`FILE` in the pod to copy to the node as broker-ca"},
		&cli.StringFlag{Name: "broker-token-from", Usage: "`FILE` in the pod to copy to the node as broker-token-file"},
		&cli.StringFlag{Name: "bin-dir", Usage: "`DIRECTORY` for the programs on the node, such as /opt/pilot/bin if /usr can't be written", Value: "/usr/local/bin"},
		&cli.StringFlag{Name: "namespace", Usage: "`NAMESPACE` of the DaemonSet", Sources: cli.EnvVars("POD_NAMESPACE")},
		&cli.StringFlag{Name: "daemonset", Usage: "`NAME` of the DaemonSet", Value: "pilot"},
		&cli.BoolFlag{Name: "check", Usage: "only report, by the exit status, whether the process of this pod has finished installing"},
	}),
	Action: nodeDeploy,
}

func settingFlags() (flags []cli.Flag) {
	for _, name := range brokerFlags {
		flags = append(flags, brokerFlag(name))
	}
	return flags
}

func nodeDeploy(ctx context.Context, c *cli.Command) error {
	if err := nodeArguments(c); err != nil {
		return err
	}
	if c.Bool("check") {
		return daemonset.Ready()
	}
	for from, name := range map[string]string{"broker-ca-from": "broker-ca", "broker-token-from": "broker-token-file"} {
		if c.IsSet(from) && c.IsSet(name) {
			return exit.Usagef("--%s and --%s are mutually exclusive", from, name)
		}
	}
	set, err := daemonset.New(c.String("namespace"), c.String("daemonset"))
	if err != nil {
		return exit.UsageError(err)
	}
	d := &daemonset.Deployment{
		BinDir:    c.String("bin-dir"),
		TokenFrom: c.String("broker-token-from"),
		CAFrom:    c.String("broker-ca-from"),
		DaemonSet: set,
	}
	for _, name := range append(brokerFlags, "containerd-binary", "containerd-config", "containerd-address") {
		if c.IsSet(name) {
			d.Install = append(d.Install, "--"+name, c.String(name))
		}
	}
	if c.IsSet("lazy") {
		d.Install = append(d.Install, fmt.Sprintf("--lazy=%v", c.Bool("lazy")))
	}
	if c.IsSet("workloads") {
		d.Install = append(d.Install, fmt.Sprintf("--workloads=%t", c.Bool("workloads")))
	}
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	return d.Run(ctx)
}
