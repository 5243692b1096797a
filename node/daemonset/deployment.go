// Package daemonset keeps pilot installed on a node from a pod of a DaemonSet, and
// removes it when the DaemonSet is deleted.
package daemonset

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/regular"
	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/host"
	"github.com/ctrlplane/pilot/node/install"
)

// Deployment keeps pilot installed on a machine from a privileged pod with hostPID. It
// copies the programs and runs "pilot node install" in the mount namespace of the
// machine's init, where it uses the machine's own systemd and containerd. So the pod needs
// no program but pilot, and no mounts of the machine.
type Deployment struct {
	// BinDir is the programs' directory on the machine.
	BinDir string
	// Install are further arguments of "pilot node install".
	Install []string
	// TokenFrom and CAFrom are files of the pod that are copied to the machine, as
	// [install.BrokerToken] and [install.BrokerCA], whenever they change; empty: none.
	TokenFrom, CAFrom string
	// DaemonSet decides whether to clean up at the end.
	DaemonSet *DaemonSet

	installed time.Time // when it was last
	failure   error     // of that
}

const (
	pollInterval  = 10 * time.Second // of the pod's files
	retryInstall  = 30 * time.Second // after an installation that failed
	retryEnding   = time.Minute      // while containers have pilot's snapshotter that is to go
	decideTimeout = 15 * time.Second // to decide whether to clean up
	readySocket   = "@pilot-node-deploy"
)

// machine is the machine that the pod runs on.
var machine = host.Host{Root: host.MachineRoot}

// Run installs pilot, then keeps the machine's copies of the pod's files up to date until
// ctx is done. It then removes pilot if the DaemonSet is being deleted.
//
// Run logs failures and retries instead of returning them, since a process that has ended
// can't clean up.
func (d *Deployment) Run(ctx context.Context) error {
	const notFound = "DaemonSet not found, so pilot would stay on this node when it is deleted: check the Role and the API server"
	for {
		if err := d.DaemonSet.Find(ctx); err != nil && ctx.Err() == nil {
			logrus.WithError(err).Error(notFound)
		}
		err := d.install(context.WithoutCancel(ctx))
		if err == nil {
			break
		}
		logrus.WithError(err).WithField("retryAfter", retryInstall.String()).Error("pilot not installed")
		if !sleep(ctx, retryInstall) {
			return d.end(ctx)
		}
	}
	logrus.Info("pilot is installed")
	var renewal error
	for {
		err := whileReady(renewal == nil, func() { sleep(ctx, pollInterval) })
		if err != nil || ctx.Err() != nil {
			return errors.Join(err, d.end(ctx))
		}
		if err := d.DaemonSet.Find(ctx); err != nil && ctx.Err() == nil {
			logrus.WithError(err).Error(notFound)
		}
		if renewal = d.renew(context.WithoutCancel(ctx)); renewal != nil {
			logrus.WithError(renewal).Error("pilot's files on the node not updated")
		}
	}
}

// whileReady makes [Ready] succeed while wait runs, if well is true.
func whileReady(well bool, wait func()) error {
	if well {
		l, err := net.Listen("unix", readySocket)
		if err != nil {
			return err
		}
		defer l.Close()
		go accept(l)
	}
	wait()
	return nil
}

// accept accepts connections, which is all that [Ready] needs, until l is closed.
func accept(l net.Listener) {
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			conn.Close()
		}
	}
}

// Ready returns an error unless a [Deployment] in the same pod has installed pilot and
// keeps it up to date.
func Ready() error {
	conn, err := net.Dial("unix", readySocket)
	if err != nil {
		return errors.New("pilot is not installed on this node (yet): see the log of \"pilot node deploy\"")
	}
	return conn.Close()
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// install installs pilot on the machine.
func (d *Deployment) install(ctx context.Context) (err error) {
	d.installed = time.Now()
	defer func() { d.failure = err }()
	if err := containerd.CheckSystem(machine); err != nil {
		return err // before anything is written
	}
	o := install.Options{Host: machine}
	// Configuration that the removal of a package has left is not an installation.
	had, err := install.Installed(install.Options{Host: machine, KeepConfig: true})
	if err != nil {
		return err
	}
	if had.Present && !o.Has(install.DaemonSetMark) {
		logrus.Warn("pilot was set up on this node by hand, and stays when the DaemonSet is deleted")
	} else if err := install.Put(ctx, o, install.DaemonSetMark, []byte(d.DaemonSet.String()+"\n"), 0o644); err != nil {
		return err
	}
	if err := d.putPrograms(ctx, o); err != nil {
		return err
	}
	if err := d.refresh(ctx, o); err != nil {
		return err
	}
	args := append([]string{"node", "install", "--now"}, d.Install...)
	if d.TokenFrom != "" {
		args = append(args, "--broker-token-file", install.BrokerToken)
	}
	if d.CAFrom != "" {
		args = append(args, "--broker-ca", install.BrokerCA)
	}
	return d.run(ctx, args...)
}

// renew updates the machine, and repairs the installation.
func (d *Deployment) renew(ctx context.Context) error {
	o := install.Options{Host: machine}
	if err := d.refresh(ctx, o); err != nil {
		return err
	}
	if d.failure != nil && time.Since(d.installed) < retryInstall {
		return d.failure
	}
	had, err := install.Installed(o)
	if err != nil {
		return err
	}
	ends := (had.Lazy == containerd.LazyEnding || had.LazyLeft) && time.Since(d.installed) >= retryEnding
	if ends || d.failure != nil || len(install.Pending(o.Host)) > 0 || !install.Intact(o) {
		return d.install(ctx)
	}
	return nil
}

// packaged reports whether pilot was installed from a package.
func packaged(h host.Host) bool {
	for _, dir := range []string{"/usr/lib/systemd/system", "/lib/systemd/system"} {
		if h.Has(filepath.Join(dir, install.PilotService)) {
			return true
		}
	}
	return false
}

// putPrograms copies pilot and pilot-decoder, unless they were installed from a package.
func (d *Deployment) putPrograms(ctx context.Context, o install.Options) error {
	if packaged(o.Host) {
		logrus.WithField("program", install.PackagedPilot).Info("pilot was installed from a package, and is used as it is")
		return nil
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	for _, name := range []string{"pilot-decoder", "pilot"} {
		program, err := os.ReadFile(filepath.Join(filepath.Dir(self), name))
		if err != nil {
			return err
		}
		if err := install.Put(ctx, o, filepath.Join(d.BinDir, name), program, 0o755, install.PilotService); err != nil {
			return elsewhere(err)
		}
	}
	return nil
}

// elsewhere adds to an error of a read-only file system, as /usr of Flatcar and others is, that the
// programs can be in another directory.
func elsewhere(err error) error {
	if fixed := host.ImmutableError(""); errors.As(err, &fixed) || errors.Is(err, unix.EROFS) {
		return fmt.Errorf("%w, or choose another directory with --bin-dir=/opt/pilot/bin (pilot.binDir of the chart)", err)
	}
	return err
}

// refresh copies the pod's files to the machine if they have changed.
func (d *Deployment) refresh(ctx context.Context, o install.Options) error {
	if d.TokenFrom != "" {
		token, err := regular.Read(d.TokenFrom, regular.MaxConfig)
		if err != nil {
			return err
		}
		if err := install.Put(ctx, o, install.BrokerToken, token, 0o600); err != nil {
			return err
		}
	}
	if d.CAFrom == "" {
		return nil
	}
	ca, err := regular.Read(d.CAFrom, regular.MaxConfig)
	if err != nil {
		return err
	}
	if _, err := certfile.Pool(d.CAFrom); err != nil {
		return fmt.Errorf("the broker's CA: %w", err)
	}
	// pilot reads it only when it starts.
	return install.Put(ctx, o, install.BrokerCA, ca, 0o644, install.PilotService)
}

// end removes pilot if the DaemonSet is being deleted.
func (d *Deployment) end(ctx context.Context) error {
	// The pod is being stopped, so ctx is done.
	ctx = context.WithoutCancel(ctx)
	asking, cancel := context.WithTimeout(ctx, decideTimeout)
	defer cancel()
	deleted, why := d.DaemonSet.Deleted(asking)
	log := logrus.WithField("because", why)
	if !deleted {
		log.Info("pilot stays on this node")
		return nil
	}
	o := install.Options{Host: machine}
	if !o.Has(install.DaemonSetMark) {
		log.Info("pilot was not installed by the DaemonSet, and stays on this node")
		return nil
	}
	log.Info("removing pilot from this node")
	return d.run(ctx, "node", "uninstall", "--now")
}

// run runs pilot on the machine.
func (d *Deployment) run(ctx context.Context, args ...string) error {
	program := filepath.Join(d.BinDir, "pilot")
	if packaged(machine) {
		program = install.PackagedPilot
	}
	if err := onMachine(ctx, program, args...); err != nil {
		return fmt.Errorf("%s on the node: %w: see above", program, err)
	}
	return nil
}

// onMachine runs a program in the mount namespace and the root directory of the machine's
// init.
func onMachine(ctx context.Context, program string, args ...string) error {
	done := make(chan error)
	go func() {
		// The thread ends with the goroutine, since it stays locked.
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread can't end, and its mount namespace counts as the process's:
			// the pod's probes would run on the machine.
			defer runtime.UnlockOSThread()
			done <- onMachine(ctx, program, args...)
			return
		}
		done <- func() error {
			ns, err := os.Open("/proc/1/ns/mnt")
			if err != nil {
				return err
			}
			defer ns.Close()
			// Threads that share a root directory can't change their mount namespace.
			if err := unix.Unshare(unix.CLONE_FS); err != nil {
				return fmt.Errorf("unshare: %w", err)
			}
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
				return fmt.Errorf("enter the mount namespace of the node's init: %w: the pod needs hostPID and privileged", err)
			}
			cmd := exec.CommandContext(ctx, program, args...)
			cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}
			cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
			return cmd.Run()
		}()
	}()
	return <-done
}
