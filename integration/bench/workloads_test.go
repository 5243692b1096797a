package bench

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/ctrlplane/pilot/integration/harness"
)

// BenchmarkWorkloads compares the creation of containers with that on a containerd that
// knows nothing of pilot.
func BenchmarkWorkloads(b *testing.B) {
	dir := benchDir(b)
	c := harness.StartCI(b, dir, "team-a")
	encrypted, pause := c.Image(harness.LayerKinds[1], "provider:pilot:team-a"), c.Pause()
	plain := encrypted + "-plain"
	harness.Output(b, c.CtrPilot("images", "push", "--plain-http", plain))

	ours := newCreator(b, harness.NewSharedNode(b, harness.Containerd2(), pause, "").Allowing(b, "a/*"), encrypted)
	asking := newCreator(b, harness.NewSharedNode(b, harness.Containerd2(), pause, "workload-verdict-ttl = \"0s\"\n").Allowing(b, "a/*"), encrypted)
	ofPlain := newCreator(b, harness.NewSharedNode(b, harness.Containerd2(), pause, "").Allowing(b, "a/*"), plain)
	theirs := newCreator(b, &harness.SharedNode{Node: harness.NewDifferNode(b, harness.TempDir(b), harness.DifferConfig{Containerd: harness.Containerd2(), Sandbox: pause, Stock: true})}, plain)
	idle := newCreator(b, newIdleNode(b, pause), plain)
	const peer = "a plain image, containerd as it is"
	for _, test := range []struct {
		name, what, target string
		ours               *creator
	}{
		{"Cached", "create a container of an encrypted image", "≤ 3 ms more", ours},
		{"Asked", "the same, if the broker is asked", "≤ 15 ms more", asking},
		{"Plain", "create a container of a plain image", "≤ 0.3 ms more", ofPlain},
	} {
		b.Run(test.name, func(b *testing.B) {
			compare(b, comparison{test.what, peer, "ms", test.target}, test.ours.median, theirs.median)
		})
	}
	b.Run("PlainNRI", func(b *testing.B) {
		compare(b, comparison{"create a container of a plain image", "the same, with an NRI plugin that does nothing", "ms", "≤ 0.3 ms more"}, ofPlain.median, idle.median)
	})
	b.Run("Many", func(b *testing.B) {
		compare(b, comparison{"create 200 containers of an encrypted image at once", peer, "ms", "≤ 1.1"},
			func() float64 { return ours.create(200, 200) }, func() float64 { return theirs.create(200, 200) })
	})
}

// newIdleNode returns a node without pilot that has an NRI plugin which does nothing.
func newIdleNode(b *testing.B, pause string) *harness.SharedNode {
	b.Helper()
	dir := harness.TempDir(b)
	build := exec.Command("go", "build", "-buildvcs=false", "-o", dir+"/nri/00-idle", "./integration/testdata/idleplugin")
	build.Dir = harness.Repo
	harness.Output(b, build)
	nri := fmt.Sprintf("  disable = false\n  plugin_path = '%s/nri'\n", dir)
	return &harness.SharedNode{Node: harness.NewDifferNode(b, dir, harness.DifferConfig{Containerd: harness.Containerd2(), Sandbox: pause, NRI: nri, Stock: true})}
}

// creator creates containers of an image on a node, by CRI.
type creator struct {
	b       testing.TB
	node    *harness.SharedNode
	conn    *grpc.ClientConn
	sandbox string
	image   string
}

func newCreator(b testing.TB, n *harness.SharedNode, image string) *creator {
	b.Helper()
	harness.Output(b, n.Crictl("pull", image))
	conn, err := grpc.NewClient("unix://"+n.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	c := &creator{b: b, node: n, conn: conn, image: image}
	// While containerd runs.
	b.Cleanup(func() {
		exec.Command(n.Crictl().Path, "--runtime-endpoint", "unix://"+n.Socket, "rmp", "-f", "-a").Run()
	})
	c.sandbox, _ = n.Sandbox(b, "a", "pod", "1")
	return c
}

// median returns how many milliseconds it takes to create a container.
func (c *creator) median() float64 {
	var all []float64
	for range 20 {
		all = append(all, c.create(1, 1))
	}
	return harness.Median(all)
}

// create creates n containers, some of them at once, and returns how many milliseconds that
// takes. It removes them.
func (c *creator) create(n, atOnce int) float64 {
	c.b.Helper()
	ids := make([]string, n)
	ms := took(func() {
		var g errgroup.Group
		g.SetLimit(atOnce)
		for i := range n {
			g.Go(func() (err error) {
				ids[i], err = c.one()
				return err
			})
		}
		if err := g.Wait(); err != nil {
			c.b.Fatal(err)
		}
	})
	harness.Output(c.b, c.node.Crictl(append([]string{"rm"}, ids...)...))
	return ms
}

// one creates a container, and returns its ID. The numbers are those of the fields in CRI's
// api.proto.
func (c *creator) one() (string, error) {
	text := func(field protowire.Number, s string) []byte {
		return protowire.AppendString(protowire.AppendTag(nil, field, protowire.BytesType), s)
	}
	message := func(field protowire.Number, parts ...[]byte) []byte {
		var all []byte
		for _, p := range parts {
			all = append(all, p...)
		}
		return protowire.AppendBytes(protowire.AppendTag(nil, field, protowire.BytesType), all)
	}
	// NODE is 2: the network and the processes of the machine.
	host := protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), 2)
	host = message(3, host, protowire.AppendVarint(protowire.AppendTag(nil, 2, protowire.VarintType), 1))
	container := message(2, message(1, text(1, harness.ContainerID())), message(2, text(1, c.image)), text(3, "/hello"), message(15, message(2, host)))
	pod := message(3, message(1, text(1, "pod"), text(2, "1"), text(3, "a")))
	request := append(append(text(1, c.sandbox), container...), pod...)
	var response []byte
	if err := c.conn.Invoke(context.Background(), "/runtime.v1.RuntimeService/CreateContainer", &request, &response, grpc.ForceCodec(rawCodec{})); err != nil {
		return "", err
	}
	_, _, n := protowire.ConsumeTag(response)
	id, m := protowire.ConsumeString(response[max(n, 0):])
	if n < 0 || m < 0 || strings.TrimSpace(id) == "" {
		return "", fmt.Errorf("no ID in %q", response)
	}
	return id, nil
}

// rawCodec passes messages on as they are.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }

func (rawCodec) Unmarshal(b []byte, v any) error {
	*v.(*[]byte) = append([]byte(nil), b...)
	return nil
}

func (rawCodec) Name() string { return "proto" }
