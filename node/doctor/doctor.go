// Package doctor examines the chain by which a node decrypts images, from pilot's
// configuration to an unpacked layer, and names a fix for each link that is broken.
// It changes nothing that lasts.
package doctor

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/client"
	keyproviderconfig "github.com/containers/ocicrypt/config/keyprovider-config"

	brokerclient "github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/mustencrypt"
	"github.com/ctrlplane/pilot/keyprovider"
	"github.com/ctrlplane/pilot/keyprovider/brokerconfig"
	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/crio"
	"github.com/ctrlplane/pilot/node/install"
	"github.com/ctrlplane/pilot/plugin"
)

// Doctor examines the chain by which a node decrypts images, with the calls that a pull
// makes. Its settings are those of "pilot serve".
type Doctor struct {
	// Configuration is the file that pilot's configuration was read from, for messages.
	// If ConfigurationError is not nil, it says why the file can't be used, and all other
	// fields are ignored.
	Configuration      string
	ConfigurationError error

	// Listen is the gRPC target of the key provider. ListenTLS is true if it requires
	// client certificates, of which the doctor has none.
	Listen    string
	ListenTLS bool
	// ProviderNames are the key provider's names in ocicrypt.conf, at least one.
	ProviderNames []string
	// Brokers is the client of the node's brokers. Provider uses them in this process,
	// with an empty cache.
	Brokers  *brokerclient.Client
	Provider *keyprovider.Provider
	// BrokerURLs, BrokerCA and BrokerCert are the settings broker, broker-ca and
	// broker-cert, for messages. The files may be "".
	BrokerURLs           []string
	BrokerCA, BrokerCert string
	// KEKs are the KEKs that the node must be able to use. May be empty.
	KEKs []string

	// DiffSocket is the path of the differ's socket, or "" if pilot serves none.
	DiffSocket string
	// LayerRecord is the file in which the differ records the keys of layers.
	LayerRecord string
	// MustBeEncrypted are the rules of the setting.
	MustBeEncrypted mustencrypt.Rules
	// Lazy is the path of the socket at which pilot serves parts of layers to its
	// snapshotter, or "" if it serves none.
	Lazy string
	// Workloads is the path of the socket at which pilot decides for containerd's NRI
	// plugin, or "" if it does not.
	Workloads string
	// LazySnapshotter is the path of the snapshotter's socket.
	LazySnapshotter string
	// Image is the name of an image whose layers to examine, or "".
	Image string
	// PublicKeys reads the files of public-keys. May be nil: the setting is not set.
	PublicKeys func() ([]brokerconfig.PublicKeyFile, error)
	// AgeIdentities are the files of the setting.
	AgeIdentities []string
	// DecryptionKeysPath is the directory of the differ's private keys, or "".
	DecryptionKeysPath string
	// Mirror has the settings of the mirror. Its Listen is "" if there is none.
	Mirror Mirror
	// Containerd is the path of containerd's socket.
	Containerd string
	// ContainerdConfig is containerd's configuration file, and ContainerdBinary the
	// program that can read it. Default: those of the process that listens at Containerd.
	ContainerdConfig, ContainerdBinary string
	// CRIO is the path of CRI-O's socket, on a node where CRI-O pulls. If it is set,
	// containerd is not examined.
	CRIO string
	// Snapshotter is the snapshotter to unpack into. Default: CRI's, or overlayfs.
	Snapshotter string
}

// Step is the result for one link of the chain.
type Step struct {
	// Name is one of the Step… constants.
	Name   string `json:"name"`
	Result Result `json:"result"`
	// Detail is one line: what was seen, what is wrong, or why the step was
	// skipped.
	Detail string `json:"detail"`
	// Fix lists the commands that fix the problem, in order, or that show more of it.
	Fix []string `json:"fix,omitempty"`
	// Mend is Fix under its first name.
	//
	// Deprecated: use Fix.
	Mend []string `json:"mend,omitempty"`
}

// Result is how a step ended.
type Result string

// A step is skipped if it can't be checked: a step that it depends on has failed, or the
// node does not have what it checks.
const (
	OK      Result = "ok"
	Failed  Result = "failed"
	Skipped Result = "skipped"
	// Warning is a step that works now, but soon will not.
	Warning Result = "warning"
)

// The steps, in their order.
const (
	StepConfiguration    = "configuration"
	StepKeyProvider      = "key-provider"
	StepDiffer           = "differ"
	StepContainerd       = "containerd"
	StepContainerdConfig = "containerd-config"
	StepBroker           = "broker"
	StepLayer            = "layer"
	StepTransfer         = "transfer"
	StepSnapshotter      = "snapshotter"     // only where images are pulled lazily
	StepLazy             = "lazy"            // likewise
	StepImage            = "image"           // with an Image, one for each layer
	StepCertificates     = "certificates"    // only with a BrokerCert, or a broker that shows one
	StepDecryptionKeys   = "decryption-keys" // only with a DecryptionKeysPath
	StepPublicKeys       = "public-keys"     // only with PublicKeys
	StepAgeIdentities    = "age-identities"  // only with AgeIdentities
	StepWorkloads        = "workloads"       // only where containerd asks about workloads
	StepDocker           = "docker"
	StepMirror           = "mirror" // only with a Mirror
)

// examineTimeout bounds an examination, without the time to clean up.
const examineTimeout = 50 * time.Second

// check is a step before it has run.
type check struct {
	name    string
	needs   []string // steps that must not have failed
	timeout time.Duration
	run     func(context.Context) Step
}

// Examine runs the steps and yields each as it ends. It takes at most about a minute, and
// leaves nothing behind on the node.
func (d *Doctor) Examine(ctx context.Context) iter.Seq[Step] {
	return func(yield func(Step) bool) {
		ctx, cancel := context.WithTimeout(ctx, examineTimeout)
		defer cancel()
		e := &examination{Doctor: d, broken: map[string]bool{}}
		defer e.close()
		for _, c := range slices.Concat(e.checks(), e.certificatesCheck(), e.decryptionKeysCheck(), e.keyFileChecks(), e.mirrorCheck()) {
			if isLazyStep(c.name) && !e.isLazy() {
				continue
			}
			step := e.step(ctx, c)
			step.Name, step.Mend = c.name, step.Fix
			if step.Result == "" {
				continue // there is nothing that it could examine
			}
			if !yield(step) {
				return
			}
		}
		if e.Image == "" || e.ConfigurationError != nil {
			return
		}
		for _, step := range e.image(ctx) {
			step.Name, step.Mend = StepImage, step.Fix
			if !yield(step) {
				return
			}
		}
	}
}

// checks are the steps, in their order.
func (e *examination) checks() []check {
	if e.CRIO != "" {
		return e.crioChecks()
	}
	return []check{
		{StepConfiguration, nil, time.Second, e.configuration},
		{StepKeyProvider, []string{StepConfiguration}, 10 * time.Second, e.keyProvider},
		{StepDiffer, []string{StepConfiguration}, 10 * time.Second, e.differ},
		{StepContainerd, []string{StepConfiguration}, 10 * time.Second, e.containerd},
		{StepContainerdConfig, []string{StepContainerd}, 20 * time.Second, e.containerdConfig},
		// pilot responds within 30 seconds.
		{StepBroker, []string{StepKeyProvider}, 32 * time.Second, e.broker},
		{StepSnapshotter, []string{StepContainerd}, 5 * time.Second, e.snapshotterStep},
		{StepLayer, []string{StepContainerdConfig, StepSnapshotter}, 20 * time.Second, e.unpackLayer},
		{StepTransfer, []string{StepContainerdConfig, StepSnapshotter}, 20 * time.Second, e.transfer},
		{StepLazy, []string{StepContainerd, StepSnapshotter, StepDiffer}, 20 * time.Second, e.lazy},
		{StepWorkloads, []string{StepContainerd}, 5 * time.Second, e.workloads},
		{StepDocker, nil, 10 * time.Second, e.docker},
	}
}

// examination is what is known while a node is examined.
type examination struct {
	*Doctor
	broken map[string]bool // steps that failed, or that need one that failed

	client  *client.Client       // of containerd, from StepContainerd on
	running *containerd.Instance // with the version of the running one
	lost    string               // how the record of the installation was lost, or ""
	dump    map[string]any       // its configuration if it was restarted now
	builtIn bool                 // pilot's differ is compiled into containerd
	kek     string               // the first that the node can use

	runningCRIO *crio.Running                      // since StepCRIO
	crioAttrs   keyproviderconfig.KeyProviderAttrs // of pilot in CRI-O's ocicrypt.conf

	crioProvider string // pilot's name there
}

func (e *examination) step(ctx context.Context, c check) Step {
	for _, need := range c.needs {
		if e.broken[need] {
			e.broken[c.name] = true
			return needs(need)
		}
	}
	within, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	step := failed("no time left: the steps before were too slow")
	if ctx.Err() == nil {
		step = c.run(within)
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		step = skipped("interrupted")
	}
	e.broken[c.name] = step.Result == Failed || ctx.Err() != nil
	return step
}

// configuration checks that pilot can use its configuration.
func (e *examination) configuration(context.Context) Step {
	if e.ConfigurationError != nil {
		return failed(fmt.Sprintf("pilot can't start with %s: %s", e.Configuration, e.ConfigurationError),
			"correct "+e.Configuration, "systemctl restart pilot.service")
	}
	if !exists(e.Configuration) {
		return passed("defaults: " + e.Configuration + " does not exist")
	}
	return passed(e.Configuration)
}

// containerd requests containerd's version.
func (e *examination) containerd(ctx context.Context) Step {
	var err error
	if e.client, err = plugin.Dial(e.Containerd); err != nil {
		return failed(err.Error(), "correct containerd in "+e.Configuration)
	}
	v, err := e.client.Version(ctx)
	if err != nil {
		service := containerd.Service
		if is, err := install.Installed(install.Options{}); err == nil {
			service = is.Service // k3s.service, for example
		}
		return failed(fmt.Sprintf("%s: containerd does not answer: %s (is its socket elsewhere? set containerd in %s)", e.Containerd, said(err), e.Configuration),
			"systemctl restart "+service, "journalctl -u "+service+" -n 30")
	}
	major, minor, patch, err := containerd.ParseVersion(v.Version)
	if err != nil {
		return failed(err.Error(), "containerd --version")
	}
	e.running = &containerd.Instance{Target: containerd.Target{Config: e.ContainerdConfig, Service: containerd.Service}, Major: major, Minor: minor, Patch: patch}
	if e.running.Config == "" {
		e.running.Config = containerd.DefaultConfig
	}
	if e.running.CheckVersion() != nil {
		return failed(fmt.Sprintf("containerd %s is too old: 1.6 decrypts layers with stream processors, 1.7 and 2.x with pilot's differ", v.Version), "upgrade containerd")
	}
	return passed(fmt.Sprintf("%s answers at %s", v.Version, e.Containerd))
}

func (e *examination) close() {
	if e.client != nil {
		e.client.Close()
	}
}

func passed(detail string) Step { return Step{Result: OK, Detail: detail} }

func failed(detail string, fix ...string) Step {
	return Step{Result: Failed, Detail: detail, Fix: fix}
}

func skipped(why string) Step { return Step{Result: Skipped, Detail: why} }

// needs returns a step that was skipped because another failed.
func needs(step string) Step { return skipped("depends on " + step + ", which failed") }

// exists reports whether this process finds a file.
func exists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}
