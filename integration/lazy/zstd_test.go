package lazy

import (
	"context"
	"maps"
	"os"
	"strconv"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images/converter"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/platforms"
	"github.com/containerd/stargz-snapshotter/nativeconverter/zstdchunked"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestZstdChunkedLayersAreMounted has images with layers of zstd:chunked: those that nerdctl
// makes are mounted as they are, and those of skopeo, buildah and podman, which have another
// table of contents, once they were converted.
func TestZstdChunkedLayersAreMounted(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	secret := harness.NewSecret()
	l := harness.NewLayout(t)
	m.pushLayout("plain:1", l, l.Image(harness.LayerKinds[1], false, harness.Arch, secret))

	client, err := containerd.New(m.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx := namespaces.WithNamespace(context.Background(), "default")
	harness.Output(t, m.Ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", m.ref("plain:1")))
	// As "nerdctl image convert --zstdchunked --oci" does.
	if _, err := converter.Convert(ctx, client, m.ref("nerdctl:1"), m.ref("plain:1"), converter.WithDockerToOCI(true), converter.WithPlatform(platforms.DefaultStrict()),
		converter.WithLayerConvertFunc(zstdchunked.LayerConvertFunc())); err != nil {
		t.Fatal(err)
	}
	harness.Output(t, m.Ctr("images", "push", "--plain-http", m.ref("nerdctl:1")))
	d := harness.NewDebian(t, m.Dir, m.OciConf)
	harness.Output(t, d.Run("skopeo", "copy", "--src-tls-verify=false", "--dest-tls-verify=false", "--dest-compress-format", "zstd:chunked",
		"docker://"+m.ref("plain:1"), "docker://"+m.ref("skopeo:1")))
	for _, name := range []string{"plain:1", "nerdctl:1"} {
		m.remove(name)
	}

	for i, test := range []struct {
		from string
		args []string
		lazy bool
	}{
		{"nerdctl:1", nil, true},
		{"skopeo:1", nil, false},
		{"skopeo:1", []string{"--estargz"}, true},
	} {
		encrypted := "encrypted:" + strconv.Itoa(i)
		for _, layer := range layersOf(m.manifest(test.from)) {
			if kind := layer["mediaType"].(string); !strings.HasSuffix(kind, "+zstd") {
				t.Errorf("%s has a layer of %s", test.from, kind)
			}
		}
		cmd := harness.Command(t, "ctr-pilot", append(append([]string{"images", "encrypt", "--plain-http", "--recipient", "provider:pilot:team-a"}, test.args...),
			"docker://"+m.ref(test.from), "docker://"+m.ref(encrypted))...)
		cmd.Env = append(os.Environ(), "OCICRYPT_KEYPROVIDER_CONFIG="+m.OciConf, "HOME="+m.Dir)
		out := harness.CombinedOutput(t, cmd)
		if strings.Contains(out, "2 of them for lazy pulling") != test.lazy {
			t.Errorf("%s %q: %s", test.from, test.args, out)
		}
		before := m.fullPulls()
		m.pull(encrypted)
		if after := m.fullPulls(); maps.Equal(before, after) != test.lazy {
			t.Errorf("%s %q: layers were pulled as a whole: %v, before %v", test.from, test.args, after, before)
		}
		if got := m.run(encrypted); got != "hello, "+secret+"\n" {
			t.Errorf("%s %q: the container prints %q", test.from, test.args, got)
		}
		m.remove(encrypted)
	}
}
