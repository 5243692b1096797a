package doctor

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	keyproviderconfig "github.com/containers/ocicrypt/config/keyprovider-config"
	"github.com/opencontainers/go-digest"

	"github.com/ctrlplane/pilot/node/crio"
	"github.com/ctrlplane/pilot/processor"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
	"github.com/ctrlplane/pilot/processor/ocicryptclient/grpcdial"
)

// The steps on a node with CRI-O, besides StepConfiguration, StepKeyProvider and
// StepBroker.
const (
	StepCRIO            = "crio"
	StepCRIOKeyProvider = "crio-key-provider"
	StepCRIOKeys        = "crio-keys"
	StepUnwrap          = "unwrap"
)

var restartCRIO = []string{"systemctl daemon-reload", "systemctl restart " + crio.Service}

// crioChecks are the steps on a node with CRI-O, in their order.
func (e *examination) crioChecks() []check {
	return []check{
		{StepConfiguration, nil, time.Second, e.configuration},
		{StepKeyProvider, []string{StepConfiguration}, 5 * time.Second, e.keyProvider},
		{StepCRIO, nil, 5 * time.Second, e.crio},
		{StepCRIOKeyProvider, []string{StepConfiguration, StepCRIO}, 5 * time.Second, e.crioKeyProvider},
		{StepCRIOKeys, []string{StepCRIO}, 5 * time.Second, e.crioKeys},
		{StepBroker, []string{StepKeyProvider}, 32 * time.Second, e.broker},
		{StepUnwrap, []string{StepCRIOKeyProvider}, 20 * time.Second, e.unwrapLayer},
	}
}

// crio requests CRI-O's configuration.
func (e *examination) crio(ctx context.Context) Step {
	var err error
	if e.runningCRIO, err = crio.Ask(ctx, e.CRIO); err != nil {
		return failed(fmt.Sprintf("%s: CRI-O does not answer: %s (is its socket elsewhere? name it with --crio)", e.CRIO, err),
			"systemctl restart "+crio.Service, "journalctl -u "+crio.Service+" -n 30")
	}
	return passed(fmt.Sprintf("CRI-O answers at %s (process %d)", e.CRIO, e.runningCRIO.PID))
}

// crioKeyProvider checks that CRI-O has read an ocicrypt.conf that leads to
// pilot.
func (e *examination) crioKeyProvider(ctx context.Context) Step {
	c := e.runningCRIO
	name, err := c.Environment(keyproviderconfig.ENVVARNAME)
	if err != nil {
		return failed(err.Error())
	}
	if name == "" {
		unit, _ := exec.CommandContext(ctx, "systemctl", "show", "--property=Environment", "--value", crio.Service).Output()
		if strings.Contains(string(unit), keyproviderconfig.ENVVARNAME+"=") {
			return failed(fmt.Sprintf("CRI-O runs without %s, which %s sets: it was not restarted since", keyproviderconfig.ENVVARNAME, crio.Service), restartCRIO...)
		}
		return failed(fmt.Sprintf("%s is not in CRI-O's environment, so it has no key provider", keyproviderconfig.ENVVARNAME), append([]string{"pilot node install"}, restartCRIO...)...)
	}
	text, err := c.Root().ReadFile(name)
	if err != nil {
		return failed(fmt.Sprintf("CRI-O's %s: %s", keyproviderconfig.ENVVARNAME, err), append([]string{"pilot node install"}, restartCRIO...)...)
	}
	var conf keyproviderconfig.OcicryptConfig
	if err := json.Unmarshal(text, &conf); err != nil {
		return failed(fmt.Sprintf("%s: %s", name, err), "correct "+name, restartCRIO[1])
	}
	i := slices.IndexFunc(e.ProviderNames, func(n string) bool { _, ok := conf.KeyProviderConfig[n]; return ok })
	if i < 0 {
		return failed(fmt.Sprintf("%s, which CRI-O reads, has no key provider %q", name, strings.Join(e.ProviderNames, ", ")), "correct "+name, restartCRIO[1])
	}
	provider := e.ProviderNames[i]
	attrs := conf.KeyProviderConfig[provider]
	switch {
	case attrs.Grpc == "" && attrs.Command == nil:
		return failed(fmt.Sprintf("%s: key provider %q has neither grpc nor cmd", name, provider), "correct "+name, restartCRIO[1])
	case attrs.Grpc != "" && grpcSocket(attrs.Grpc) != grpcSocket(e.Listen):
		return failed(fmt.Sprintf("%s has CRI-O ask %s, and pilot listens at %s", name, attrs.Grpc, e.Listen), "correct "+name+" or listen in "+e.Configuration, restartCRIO[1])
	}
	// CRI-O reads the file only when it starts.
	info, err := os.Stat(c.Path(name))
	if err != nil {
		return failed(err.Error())
	}
	if info.ModTime().After(c.Started.Add(time.Second)) {
		return failed(fmt.Sprintf("%s was changed %s, after CRI-O had read it (%s)", name, info.ModTime().Format(time.DateTime), c.Started.Format(time.DateTime)), restartCRIO[1])
	}
	e.crioProvider, e.crioAttrs = provider, attrs
	return passed(fmt.Sprintf("CRI-O asks pilot: %s=%s", keyproviderconfig.ENVVARNAME, name))
}

// grpcSocket returns a gRPC target without the prefix of a unix socket.
func grpcSocket(target string) string {
	return strings.TrimPrefix(strings.TrimPrefix(target, "unix://"), "unix:")
}

// crioKeys checks CRI-O's directory of private keys, which pilot does not need.
func (e *examination) crioKeys(context.Context) Step {
	dir := e.runningCRIO.KeysPath
	keys, err := e.runningCRIO.CheckKeys()
	switch away := strings.TrimSuffix(dir, "/") + ".away"; {
	case err != nil:
		return failed(fmt.Sprintf("CRI-O fails every pull, also of plain images, because of its decryption_keys_path %s: %s", dir, err), "move that file out of "+dir+", or move the directory: mv "+dir+" "+away)
	case keys < 0:
		return passed("decryption_keys_path " + dir + " does not exist, which is fine")
	}
	return passed(fmt.Sprintf("decryption_keys_path %s has private keys: %d", dir, keys))
}

// unwrapLayer encrypts a layer and decrypts it with CRI-O's key provider, as a pull does.
func (e *examination) unwrapLayer(ctx context.Context) Step {
	if step, none := e.withoutKEK(); none {
		return step
	}
	layer, err := newTestLayer(ctx, e.crioProvider, e.Listen, e.kek)
	if err == nil {
		err = layer.decrypt(ctx, e.crioProvider, e.crioAttrs)
	}
	if err != nil {
		return failed(err.Error(), "journalctl -u pilot.service -n 30")
	}
	return passed(fmt.Sprintf("a layer encrypted for KEK %q was decrypted with CRI-O's key provider", e.kek))
}

// decrypt decrypts the layer with a key provider, and compares its diff ID.
func (l *testLayer) decrypt(ctx context.Context, provider string, attrs keyproviderconfig.KeyProviderAttrs) error {
	client, err := ocicryptclient.New(provider, attrs, grpcdial.Call)
	if err != nil {
		return err
	}
	keys := processor.Keys{Providers: map[string]processor.KeyProvider{provider: client}}
	var packed bytes.Buffer
	if err := processor.Decrypt(ctx, &packed, bytes.NewReader(l.blob), l.desc, keys); err != nil {
		return err
	}
	z, err := gzip.NewReader(&packed)
	if err != nil {
		return err
	}
	plain, err := io.ReadAll(z)
	if err == nil && digest.FromBytes(plain) != l.diffID {
		err = errors.New("the decrypted layer is not the one that was encrypted")
	}
	return err
}
