//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/wireformat"
	"github.com/ctrlplane/pilot/keyprovider/brokerconfig"
	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/crio"
	"github.com/ctrlplane/pilot/node/doctor"
	"github.com/ctrlplane/pilot/node/host"
)

var doctorCommand = &cli.Command{
	Name:  "doctor",
	Usage: "check that this machine decrypts images, and suggest fixes",
	Description: `Checks the whole chain with real calls: pilot's configuration and sockets,
containerd and its configuration, the broker, and a small encrypted layer that
is unpacked and removed again. Run it as root, with the settings of pilot serve.
It takes a minute at most.

On a machine with CRI-O, it checks CRI-O's environment and directory of keys
instead of containerd, and decrypts a small layer with CRI-O's key provider.

On a machine that pulls lazily, it also pulls a small image that way. With the
name of an IMAGE, it says of each layer whether it was pulled lazily, and if not,
why.

With a mirror, it checks that the mirror answers, and that containerd goes to
it and to nothing else where its hosts.toml names the mirror.

It warns of certificates that expire within 14 days, or in the last quarter of
their time if that is a week or less, of public keys that expire within 30 days,
and of identities of age that other users can read.

The exit status is 0 if no check failed, 1 if one did, and 2 if pilot's
configuration or an argument can't be used.

Example:
   pilot node doctor --kek team-a
   pilot node doctor registry.example.com/team/app:1`,
	ArgsUsage: "[IMAGE]",
	Flags: slices.Concat(configFlags(append(brokerSettings,
		"listen", "provider-name", "annotation-format", "default-keks", "diff-listen", "layer-record", "must-be-encrypted", "lazy-listen", "workloads-listen", "containerd", "decryption-keys-path", "public-keys", "public-keys-ca", "age-identities",
		"mirror-listen", "mirror-secret-file", "mirror-hosts-dir")...), containerdFlags(), []cli.Flag{
		&cli.StringSliceFlag{Name: "kek", Usage: "`KEK` that this machine has to be able to use; can be repeated (default: default-keks)"},
		&cli.StringFlag{Name: "crio", Usage: "`SOCKET` of CRI-O, to examine it instead of containerd (default: " + crio.Socket + " where there is CRI-O and no containerd)"},
		&cli.StringFlag{Name: "snapshotter", Usage: "containerd's `SNAPSHOTTER` to unpack into (default: that of the kubelet's images)"},
		&cli.StringFlag{Name: "lazy-snapshotter", Usage: "`SOCKET` of pilot's snapshotter", Value: containerd.LazySocket},
		&cli.BoolFlag{Name: "json", Usage: "print JSON"},
	}),
	Action: nodeDoctor,
}

func nodeDoctor(ctx context.Context, c *cli.Command) error {
	if c.NArg() > 1 {
		return exit.Usagef("doctor takes one image at most, and got %q", c.Args().Slice())
	}
	if os.Geteuid() != 0 {
		return exit.Usagef("doctor needs root for sockets and mounts: run sudo pilot node doctor")
	}
	keks := c.StringSlice("kek")
	for _, kek := range keks {
		if err := wireformat.ValidateKEKID(kek); err != nil {
			return exit.Usagef("--kek: %w", err)
		}
	}
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	d := newDoctor(c)
	if len(keks) > 0 {
		d.KEKs = keks
	}
	// Failures are in the report.
	logrus.SetLevel(logrus.ErrorLevel)

	report := struct {
		OK    bool          `json:"ok"`
		Steps []doctor.Step `json:"steps"`
	}{OK: true}
	var wrong []string
	for step := range d.Examine(ctx) {
		report.Steps = append(report.Steps, step)
		if step.Result == doctor.Failed {
			report.OK = false
			wrong = append(wrong, step.Name)
		}
		if !c.Bool("json") {
			printStep(step)
		}
	}
	report.OK = report.OK && ctx.Err() == nil
	if c.Bool("json") {
		out := json.NewEncoder(os.Stdout)
		out.SetEscapeHTML(false)
		out.SetIndent("", "  ")
		if err := out.Encode(report); err != nil {
			return err
		}
	}
	switch {
	case d.ConfigurationError != nil:
		return exit.Usagef("pilot's configuration can't be used")
	case ctx.Err() != nil:
		return errors.New("interrupted")
	case len(wrong) > 0:
		return fmt.Errorf("failed checks: %s", strings.Join(wrong, ", "))
	}
	return nil
}

// newDoctor returns a doctor for the machine that the configuration describes.
func newDoctor(c *cli.Command) *doctor.Doctor {
	d := &doctor.Doctor{Configuration: c.String("config"), ContainerdBinary: c.String("containerd-binary"), ContainerdConfig: c.String("containerd-config"), Snapshotter: c.String("snapshotter")}
	if d.Configuration == "" {
		d.Configuration = brokerconfig.DefaultFile
	}
	conf, err := loadConfiguration(c)
	if err == nil {
		d.Brokers, err = conf.Client()
	}
	if err == nil {
		_, err = conf.serverOptions()
	}
	if d.ConfigurationError = err; err == nil {
		d.Provider = conf.provider(d.Brokers, nil)
	}
	d.Listen, d.ListenTLS = string(conf.Listen), conf.listensByTLS()
	d.ProviderNames = conf.ProviderName
	d.BrokerURLs, d.BrokerCA, d.BrokerCert = conf.Broker, conf.BrokerCA, conf.BrokerCert
	d.KEKs = conf.DefaultKEKs
	d.DiffSocket = conf.DiffListen.path()
	d.Workloads = conf.WorkloadsListen.path()
	d.LayerRecord, d.MustBeEncrypted = conf.LayerRecord, conf.MustBeEncrypted
	d.Lazy, d.LazySnapshotter = conf.LazyListen.path(), c.String("lazy-snapshotter")
	d.DecryptionKeysPath, d.AgeIdentities = conf.DecryptionKeys, conf.AgeIdentities
	if len(conf.PublicKeys) > 0 {
		d.PublicKeys = conf.PublicKeyFiles
	}
	d.Mirror.HostsDir = conf.MirrorHostsDir
	if conf.MirrorListen != mirrorOff {
		d.Mirror = doctor.Mirror{Listen: string(conf.MirrorListen), Cert: conf.TLSCert, Key: conf.TLSKey, SecretFile: conf.MirrorSecretFile, HostsDir: conf.MirrorHostsDir}
	}
	d.Containerd = string(conf.Containerd)
	d.Image = c.Args().First()
	d.CRIO = c.String("crio")
	if d.CRIO == "" && crio.PullsImages(host.Host{}, containerd.Named{Binary: d.ContainerdBinary, Config: d.ContainerdConfig}) {
		d.CRIO = crio.Socket
	}
	return d
}

// printStep prints a step as lines of text.
func printStep(s doctor.Step) {
	fmt.Printf("%-8s %-18s %s\n", s.Result, s.Name, s.Detail)
	for _, command := range s.Fix {
		fmt.Printf("%-8s %-18s   fix: %s\n", "", "", command)
	}
}
