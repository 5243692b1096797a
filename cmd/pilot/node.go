//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/host"
	"github.com/ctrlplane/pilot/node/install"
)

var nodeCommand = &cli.Command{
	Name:  "node",
	Usage: "set up this machine with pilot, and check it",
	Description: `Connects this machine's containerd or CRI-O with pilot, and undoes that byte for byte.

Example:
   pilot node install --now --broker https://copilot.example.com:8443 \
      --broker-ca ca.pem --broker-cert node.pem --broker-key node-key.pem
   pilot node doctor --kek team-a`,
	Commands: []*cli.Command{
		{
			Name:  "install",
			Usage: "make containerd or CRI-O decrypt images with pilot",
			Description: `Examines the machine's containerd and writes only what is needed: a drop-in of
containerd's configuration, pilot.toml, ocicrypt.conf and systemd's units.
Existing files are not overwritten: those in the way are listed. A second run
changes nothing.

On a machine with CRI-O and no containerd, it writes a drop-in of crio.service
instead of containerd's.

With --lazy it also sets up pilot's snapshotter for the kubelet's images: those
that "ctr-pilot images encrypt --estargz" has made start before they are pulled.
All others are unpacked into that snapshotter. Running containers are left alone.
--lazy=false takes that back, and keeps the snapshotter only until no container
has it any more. Without the flag, it stays as it is. Images whose layers
containerd does not have are pulled again after either.

With --workloads containerd asks pilot about each container that the kubelet has it
create, and pilot the broker, whether the pod's namespace, service account and labels
may use the KEKs of its image. Write rules with workloads into copilot's policy first.

Example:
   pilot node install --now --broker https://copilot.example.com:8443 \
      --broker-ca /etc/pilot/ca.pem --broker-cert /etc/pilot/node.pem --broker-key /etc/pilot/node-key.pem`,
			Flags: slices.Concat(nodeFlags(), containerdFlags(), []cli.Flag{
				&cli.StringFlag{Name: "containerd-address", Usage: "`SOCKET` of the containerd to set up, where several run"},
				&cli.BoolFlag{Name: "lazy", Usage: "pull encrypted eStargz images lazily, with pilot's snapshotter; --lazy=false: no longer (default: as it is)"},
				&cli.BoolFlag{Name: "workloads", Usage: "have containerd ask pilot about each container whether its workload may use the image's KEKs; --workloads=false undoes that"},
				&cli.BoolFlag{Name: "dry-run", Usage: "show what would be changed"},
				&cli.BoolFlag{Name: "json", Usage: "with --dry-run: print JSON"},
				&cli.StringFlag{Name: "pilot-binary", Usage: "`PATH` of pilot on the machine (default: this program)"},
			}, settingFlags()),
			Action: nodeInstall,
		},
		{
			Name:  "uninstall",
			Usage: "restore everything as it was before install",
			Description: `Undoes install, byte for byte. Files that were changed since are kept and
listed.

If containers run from pilot's snapshotter, it changes nothing and lists them:
drain the node first.

Example:
   pilot node uninstall --now`,
			Flags: append(nodeFlags(),
				&cli.BoolFlag{Name: "keep-config", Usage: "leave /etc/pilot as it is, for another install"},
				&cli.BoolFlag{Name: "force", Usage: "go on although containers run from pilot's snapshotter, which lose their files"},
			),
			Action: nodeUninstall,
		},
		{
			Name:  "refresh",
			Usage: "bring containerd's configuration up to date, before containerd starts",
			Description: `systemd runs this before containerd on a node with pilot: containerd's
configuration may have been rewritten, other tools may have been added or
removed, or containerd may be another version. If pilot can't be added without
changing something else, containerd starts without pilot, and the log says why.

Example:
   pilot node refresh`,
			Action: nodeRefresh,
		},
		forgetCommand,
		renewCommand,
		deployCommand,
		doctorCommand,
	},
}

// nodeFlags are those of install and uninstall.
func nodeFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "root", Usage: "root `DIRECTORY` of an unpacked node image, instead of this machine"},
		&cli.BoolFlag{Name: "trust-root", Usage: "run programs of --root in a bare chroot, where no sandbox can be made: only if you trust them all"},
		&cli.BoolFlag{Name: "now", Usage: "start or stop pilot, and restart containerd or CRI-O if its configuration changes"},
	}
}

// containerdFlags are those of install and doctor.
func containerdFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "containerd-binary", Usage: "containerd's `PROGRAM` (default: that of the containerd that runs)"},
		&cli.StringFlag{Name: "containerd-config", Usage: "containerd's configuration `FILE` (default: that of the containerd that runs)"},
	}
}

// brokerFlag is a setting for pilot.toml.
func brokerFlag(name string) cli.Flag {
	for _, s := range settings {
		if s.Name == name {
			return &cli.StringFlag{Name: name, Usage: s.Usage + ", for pilot.toml"}
		}
	}
	panic("unknown setting " + name)
}

func nodeInstall(ctx context.Context, c *cli.Command) error {
	h, err := host.New(c.String("root"), c.Bool("trust-root"))
	if err != nil {
		return err
	}
	o := install.Options{
		Host: h,
		Containerd: containerd.Named{
			Binary:  c.String("containerd-binary"),
			Config:  c.String("containerd-config"),
			Address: strings.TrimPrefix(c.String("containerd-address"), "unix://"),
		},
		PilotBinary: c.String("pilot-binary"),
		Settings:    map[string]string{},
	}
	if c.IsSet("lazy") {
		lazy := c.Bool("lazy")
		o.Lazy = &lazy
	}
	if c.IsSet("workloads") {
		o.Workloads = install.Off
		if c.Bool("workloads") {
			o.Workloads = install.On
		}
	}
	if err := nodeArguments(c); err != nil {
		return err
	}
	if c.Bool("json") && !c.Bool("dry-run") {
		return exit.Usagef("--json is for --dry-run")
	}
	if err := rootArguments(c); err != nil {
		return err
	}
	// As sd_booted(3) does.
	if _, err := os.Stat("/run/systemd/system"); c.Bool("now") && !c.Bool("dry-run") && err != nil {
		return exit.Usagef("--now starts and restarts services with systemd, which does not run here: without it, \"pilot node install\" prints what to do by hand")
	}
	conf := defaults()
	for _, s := range settings {
		if !c.IsSet(s.Name) {
			continue
		}
		v := c.String(s.Name)
		if strings.HasPrefix(s.Name, "broker-") && !filepath.IsAbs(v) {
			return exit.Usagef("--%s %s: use an absolute path: the daemon runs in another directory", s.Name, v)
		}
		if err := s.Set(&conf, v); err != nil {
			return exit.Usagef("--%s: %w", s.Name, err)
		}
		o.Settings[s.Name] = v
	}
	if err := conf.check(); err != nil {
		return exit.UsageError(err)
	}
	if c.String("root") == "" {
		// On a node image the files may come later.
		if _, err := conf.Client(); err != nil {
			return err
		}
	}
	again, err := carryOut(ctx, c, o)
	if err == nil && again {
		_, err = carryOut(ctx, c, o)
	}
	return err
}

// carryOut plans an installation, and carries it out. It reports whether another one now
// would remove what was kept for containers that there are none of.
func carryOut(ctx context.Context, c *cli.Command, o install.Options) (again bool, err error) {
	had, err := install.Installed(o)
	if err != nil {
		return false, err
	}
	o.LazyUnused = had.Lazy == containerd.LazyEnding && lazyUse(ctx, had).none()
	plan, err := install.NewPlan(ctx, o)
	if err != nil {
		return false, err
	}
	defer plan.Close()
	fmt.Fprintln(os.Stderr, "found "+plan.Runtime())
	if files, why := plan.Adopted(); len(files) > 0 {
		fmt.Fprintf(os.Stderr, "%s. These files were written by pilot and are adopted: %s\n", why, strings.Join(files, ", "))
	}
	if c.Bool("dry-run") {
		return false, printPlan(plan, c.Bool("json"))
	}
	if err := plan.Install(ctx); err != nil {
		return false, err
	}
	for _, change := range plan.Changes {
		did := "wrote"
		if change.Remove {
			did = "removed"
		}
		fmt.Printf("%s %s\n", did, change.Path)
	}
	if len(plan.Changes) == 0 {
		fmt.Println("nothing to change: the files are as they should be (\"pilot node doctor\" checks that they work)")
	}
	for _, line := range plan.DockerNote(ctx) {
		fmt.Println(line)
	}
	if o.Root == "" && !o.HasSystemd() {
		if len(plan.Changes) > 0 {
			fmt.Printf("there is no systemd here: have \"%[1]s node refresh\" and \"%[1]s serve\" started before containerd, and restart containerd then. While pilot does not run, it can't pull any image\n", thisProgram())
		}
		return false, nil
	}
	now := c.Bool("now")
	is, err := install.Installed(o)
	if err != nil || o.Root != "" || len(plan.Changes) == 0 && !now && len(install.Pending(o.Host)) == 0 && !is.LazyLeft {
		return false, err
	}
	if is.Lazy != had.Lazy && !now {
		warnStranded(ctx, is)
	}
	// Its last commands wait for this installation to end.
	plan.Close()
	pending := install.Pending(o.Host)
	restarts, afterwards := installCommands(is, pending, now)
	if !now {
		restarts, afterwards = slices.Concat(restarts, afterwards), nil
	}
	if err := runOrPrint(now, restarts); err != nil {
		return false, fmt.Errorf("%w: the configuration names pilot already, so from its next start on %s can't pull any image while pilot does not run: correct this and run it again, or run \"pilot node uninstall --now\"", err, is.Service)
	}
	if now {
		// Before what may fail: the next installation must not restart anything for it.
		if err := o.Restarted(pending); err != nil {
			return false, err
		}
	}
	if err := runOrPrint(now, afterwards); err != nil {
		return false, err
	}
	if is.Lazy != containerd.LazyEnding {
		return false, nil
	}
	if !now {
		fmt.Println("pilot's snapshotter stays for the containers that have it: run \"pilot node install\" again once they have ended")
		return false, nil
	}
	use := lazyUse(ctx, is)
	if use.none() {
		return true, nil
	}
	fmt.Printf("pilot's snapshotter stays for the containers that have it: run \"pilot node install --now\" again once they have ended (%s)\n", use)
	return false, nil
}

func nodeUninstall(ctx context.Context, c *cli.Command) error {
	if err := rootArguments(c); err != nil {
		return err
	}
	h, err := host.New(c.String("root"), c.Bool("trust-root"))
	if err != nil {
		return err
	}
	o := install.Options{Host: h, KeepConfig: c.Bool("keep-config"), Force: c.Bool("force")}
	had, err := install.Installed(o)
	if err != nil {
		return err
	}
	if !had.Present {
		// An installation that was killed early may have left a file.
		if _, err := install.Uninstall(ctx, o); err != nil {
			return err
		}
		fmt.Println("nothing is installed")
		return removeLayerRecord(o, c.Bool("now"), nil)
	}
	now := c.Bool("now")
	if had.LazyPresent() && had.Program && !now && o.Root == "" {
		return exit.Usagef("nothing was changed: pilot's program is removed too, and is needed afterwards to remove what its snapshotter has left: use --now")
	}
	// Files that were changed since are listed at the end.
	unsure, stays := install.Uninstall(ctx, o)
	var used *install.LazyInUse
	if errors.As(stays, &used) {
		return fmt.Errorf("nothing was changed: %w: remove them first (kubectl drain; it leaves pods of DaemonSets, which \"crictl rmp -fa\" removes once the kubelet is stopped), or use --force", stays)
	}
	if len(unsure) > 0 {
		fmt.Println("the record of the installation is lost, so these files are kept: remove them if pilot installed them")
		for _, path := range unsure {
			fmt.Println("  " + path)
		}
	} else if stays == nil {
		fmt.Println("everything is as it was before")
	}
	if c.String("root") != "" || install.Connected(o) {
		return stays
	}
	if !h.HasSystemd() {
		fmt.Println("there is no systemd here: restart containerd, and stop \"pilot serve\"")
		return errors.Join(removeLayerRecord(o, false, nil), stays)
	}
	isStopped := stopped
	if !now {
		isStopped = func(string) bool { return false }
	}
	return errors.Join(removeLayerRecord(o, now, uninstallCommands(had, isStopped, o.Force)), stays)
}

// removeLayerRecord runs commands that stop pilot and all that asks it, and removes pilot's
// record of layers then, or prints the commands for both.
func removeLayerRecord(o install.Options, now bool, commands []string) error {
	if !now {
		commands = append(commands, o.RemoveLayerRecordCommands()...)
	}
	if err := runOrPrint(now, commands); err != nil {
		return err
	}
	if now {
		return o.RemoveLayerRecord()
	}
	return nil
}

func nodeRefresh(ctx context.Context, c *cli.Command) error {
	if err := rootArguments(c); err != nil {
		return err
	}
	changed, err := install.Refresh(ctx, install.Options{})
	for _, path := range changed {
		logrus.WithField("file", path).Info("containerd's configuration was changed since pilot was installed: file rewritten")
	}
	return err
}

func nodeArguments(c *cli.Command) error {
	if c.NArg() > 0 {
		return exit.Usagef("node %s takes no argument, and got %q", c.Name, c.Args().First())
	}
	if c.Bool("now") && c.String("root") != "" {
		return exit.Usagef("--now and --root are mutually exclusive: --root is for a machine that does not run")
	}
	return nil
}

// rootArguments is nodeArguments, and rejects other users on the machine that runs.
func rootArguments(c *cli.Command) error {
	if err := nodeArguments(c); err != nil {
		return err
	}
	if c.String("root") == "" && os.Geteuid() != 0 {
		return exit.Usagef("node %s needs root: run sudo pilot node %[1]s", c.Name)
	}
	return nil
}
