package node

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

var restartCRIO = []string{"systemctl daemon-reload", "systemctl restart " + CRIOService}

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

// crio asks CRI-O for its configuration.
func (e *examination) crio(ctx context.Context) Step {
	var err error
	if e.runningCRIO, err = askCRIO(ctx, e.CRIO); err != nil {
		return failed(fmt.Sprintf("%s: CRI-O does not answer: %s (is its socket elsewhere? name it with --crio)", e.CRIO, err),
			"systemctl restart "+CRIOService, "journalctl -u "+CRIOService+" -n 30")
	}
	return inOrder(fmt.Sprintf("CRI-O answers at %s (process %d)", e.CRIO, e.runningCRIO.pid))
}

// crioKeyProvider checks that CRI-O has read an ocicrypt.conf that leads to
// pilot.
func (e *examination) crioKeyProvider(ctx context.Context) Step {
	c := e.runningCRIO
	name, err := c.environment(keyproviderconfig.ENVVARNAME)
	if err != nil {
		return failed(err.Error())
	}
	if name == "" {
		unit, _ := exec.CommandContext(ctx, "systemctl", "show", "--property=Environment", "--value", CRIOService).Output()
		if strings.Contains(string(unit), keyproviderconfig.ENVVARNAME+"=") {
			return failed(fmt.Sprintf("CRI-O runs without %s, which %s sets: it was not restarted since", keyproviderconfig.ENVVARNAME, CRIOService), restartCRIO...)
		}
		return failed(fmt.Sprintf("%s is not in CRI-O's environment, so it knows no key provider", keyproviderconfig.ENVVARNAME), append([]string{"pilot node install"}, restartCRIO...)...)
	}
	text, err := c.root().readFile(name)
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
	// CRI-O reads the file when it starts, and never again.
	info, err := os.Stat(c.path(name))
	if err != nil {
		return failed(err.Error())
	}
	if info.ModTime().After(c.started.Add(time.Second)) {
		return failed(fmt.Sprintf("%s was changed %s, after CRI-O had read it (%s)", name, info.ModTime().Format(time.DateTime), c.started.Format(time.DateTime)), restartCRIO[1])
	}
	e.crioProvider, e.crioAttrs = provider, attrs
	return inOrder(fmt.Sprintf("CRI-O asks pilot: %s=%s", keyproviderconfig.ENVVARNAME, name))
}

// grpcSocket returns a target without the two ways to write that it is a unix
// socket's path.
func grpcSocket(target string) string {
	return strings.TrimPrefix(strings.TrimPrefix(target, "unix://"), "unix:")
}

// crioKeys looks at CRI-O's directory of private keys, of which pilot needs none.
func (e *examination) crioKeys(context.Context) Step {
	dir := e.runningCRIO.keysPath
	keys, err := e.runningCRIO.checkKeys()
	switch away := strings.TrimSuffix(dir, "/") + ".away"; {
	case err != nil:
		return failed(fmt.Sprintf("CRI-O fails every pull, of plain images too, because of its decryption_keys_path %s: %s", dir, err), "move that out of "+dir+", or all of it: mv "+dir+" "+away)
	case keys < 0:
		return inOrder("decryption_keys_path " + dir + " does not exist, and need not")
	}
	return inOrder(fmt.Sprintf("decryption_keys_path %s has private keys: %d", dir, keys))
}

// unwrapLayer encrypts a layer and decrypts it with the key provider that CRI-O
// has, as a pull does.
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
	return inOrder(fmt.Sprintf("a layer encrypted for KEK %q was decrypted with CRI-O's key provider", e.kek))
}

// decrypt decrypts the layer with a key provider, and compares.
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
		err = errors.New("what was encrypted came back as something else")
	}
	return err
}
