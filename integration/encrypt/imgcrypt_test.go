package encrypt

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/imgcrypt/v2/images/encryption"
	"github.com/containers/ocicrypt"
	"github.com/containers/ocicrypt/config"
	keyproviderconfig "github.com/containers/ocicrypt/config/keyprovider-config"
	"github.com/containers/ocicrypt/keywrap/keyprovider"
	"github.com/ctrlplane/pilot/image"
	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/ctrlplane/pilot/processor"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
	"github.com/ctrlplane/pilot/processor/ocicryptclient/grpcdial"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestImgcrypt has imgcrypt's library decrypt what we encrypt, and the reverse,
// for a key and for a KEK: images of each kind of layer, and indexes.
func TestImgcrypt(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.JWE)
	dir := harness.TempDir(t)
	_, brokerURL := harness.StartBroker(t, dir+"/broker", "team-a")
	_, conf := harness.StartPilot(t, dir, brokerURL)
	providers, err := ocicryptclient.FromFile(conf, grpcdial.Call)
	if err != nil {
		t.Fatal(err)
	}
	ocicrypt.RegisterKeyWrapper("provider.pilot", keyprovider.NewKeyWrapper("pilot", keyproviderconfig.KeyProviderAttrs{
		Grpc: "unix://" + dir + "/keyprovider.sock",
	}))
	private, public := harness.KeyPair(t, dir+"/keys")
	ctx := t.Context()
	store, err := local.NewLabeledStore(dir+"/content", &labels{})
	if err != nil {
		t.Fatal(err)
	}
	for recipient, cc := range map[string]*config.CryptoConfig{
		"jwe": {
			EncryptConfig: &config.EncryptConfig{Parameters: map[string][][]byte{"pubkeys": {[]byte(harness.Read(t, public))}}},
			DecryptConfig: &config.DecryptConfig{Parameters: map[string][][]byte{"privkeys": {[]byte(harness.Read(t, private))}, "privkeys-passwords": {nil}}},
		},
		"provider": {
			EncryptConfig: &config.EncryptConfig{Parameters: map[string][][]byte{"pilot": {[]byte("team-a")}}},
			DecryptConfig: &config.DecryptConfig{},
		},
	} {
		for _, k := range harness.LayerKinds {
			for _, format := range []string{"image", "docker", "index", "lazy"} {
				t.Run(recipient+"/"+k.Name+"/"+format, func(t *testing.T) {
					if recipient == "provider" && k.Name != "gzip" { // jwe has the others
						harness.Long(t)
					}
					l := harness.NewLayout(t)
					var o harness.Object
					switch format {
					case "image":
						o = l.Image(k, false, harness.Arch, harness.NewSecret())
					case "docker":
						o = l.Image(k, true, harness.Arch, harness.NewSecret())
					case "index":
						o = l.Index(k, harness.NewSecret())
					case "lazy":
						if k.Name != "gzip" {
							return // eStargz is
						}
						o = estargzImage(t, l, harness.NewSecret())
					}
					plain := l.WriteTo(ctx, store, o)
					isLayer := func(desc ocispec.Descriptor) bool { return !strings.Contains(desc.MediaType, "in-toto") }

					// imgcrypt refuses an index with encrypted attestations.
					to := processor.Recipients{Keys: processor.Keys{Providers: providers}, Parameters: cc.EncryptConfig.Parameters}
					ours, err := image.Encrypt(ctx, store, plain, to, image.Options{Attestations: image.KeepAttestations})
					if err != nil || (ours.Lazy == 1) != (format == "lazy") {
						t.Fatal(err, ours.Lazy)
					}
					theirs, modified, err := encryption.DecryptImage(ctx, store, ours.Target, cc, isLayer)
					if err != nil || !modified {
						t.Fatalf("imgcrypt does not decrypt ours: %v", err)
					}
					sameLayers(ctx, t, store, theirs, plain)

					if k.Docker == "application/vnd.docker.image.rootfs.diff.tar.zstd" && format == "docker" {
						return // imgcrypt does not know these
					}
					theirs, _, err = encryption.EncryptImage(ctx, store, plain, cc, isLayer)
					if err != nil {
						t.Fatal(err)
					}
					back, err := image.Decrypt(ctx, store, theirs, to.Keys.With(cc.DecryptConfig), image.Options{})
					if err != nil {
						t.Fatalf("we do not decrypt imgcrypt's: %v", err)
					}
					sameLayers(ctx, t, store, back.Target, plain)
				})
			}
		}
	}
}

// sameLayers checks that two images have the same layers on the same platforms.
func sameLayers(ctx context.Context, t testing.TB, store content.Store, got, want ocispec.Descriptor) {
	t.Helper()
	var both [2][]string
	for i, target := range []ocispec.Descriptor{got, want} {
		layers, err := image.Layers(ctx, store, target, image.Options{})
		if err != nil {
			t.Fatal(err)
		}
		for _, layer := range layers {
			both[i] = append(both[i], fmt.Sprintf("%s %v", layer.Descriptor.Digest, layer.Platform))
		}
	}
	if a, b := strings.Join(both[0], "\n"), strings.Join(both[1], "\n"); a != b {
		t.Errorf("layers\n%s\nwant\n%s", a, b)
	}
}

// labels keeps the labels of blobs, as containerd's database would.
type labels struct {
	all map[digest.Digest]map[string]string
}

func (l *labels) Get(d digest.Digest) (map[string]string, error) { return l.all[d], nil }

func (l *labels) Set(d digest.Digest, labels map[string]string) error {
	if l.all == nil {
		l.all = make(map[digest.Digest]map[string]string)
	}
	l.all[d] = labels
	return nil
}

func (l *labels) Update(d digest.Digest, update map[string]string) (map[string]string, error) {
	all := map[string]string{}
	for key, value := range l.all[d] {
		all[key] = value
	}
	for key, value := range update {
		all[key] = value
	}
	return all, l.Set(d, all)
}
