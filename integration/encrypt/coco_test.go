package encrypt

import (
	"bytes"
	"compress/gzip"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// kbs stands for a Key Broker Service that has attested a guest: a client of its plugin
// protocol for external programs, by protos/plugin.proto of
// github.com/confidential-containers/trustee.
type kbs struct {
	*grpc.ClientConn
	address string
}

// newKBS starts "pilot kbs-plugin" with a client's certificate, and returns its KBS.
func newKBS(t testing.TB, b *harness.TLSBroker, cert, key string) kbs {
	t.Helper()
	address := loopbacktest.FreeAddress(t)
	harness.Start(t, harness.TempDir(t), "pilot", exec.Command("pilot", "kbs-plugin", "--config", os.DevNull, "--plugin-listen", address,
		"--broker", b.URL(), "--broker-ca", b.Dir+"/ca.pem", "--broker-cert", cert, "--broker-key", key))
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(rawMessages{}), grpc.WaitForReady(true)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return kbs{conn, address}
}

// rawMessages passes messages as they are on the wire.
type rawMessages struct{}

func (rawMessages) Name() string { return "proto" }

func (rawMessages) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*v.(*[]byte))}, nil
}

func (rawMessages) Unmarshal(b mem.BufferSlice, v any) error {
	*v.(*[]byte) = b.Materialize()
	return nil
}

// call calls a method of the plugin, and returns fields 1 and 2 of the response.
func (k kbs) call(t testing.TB, rpc, method string, path ...string) (body []byte, numbers map[protowire.Number]uint64) {
	t.Helper()
	var in, out []byte
	for _, part := range path {
		in = protowire.AppendString(protowire.AppendTag(in, 3, protowire.BytesType), part)
	}
	in = protowire.AppendString(protowire.AppendTag(in, 4, protowire.BytesType), method)
	if err := k.Invoke(t.Context(), "/kbs.plugin.v1.KbsPlugin/"+rpc, &in, &out); err != nil {
		t.Fatalf("%s %s %v: %v", rpc, method, path, err)
	}
	numbers = map[protowire.Number]uint64{}
	for len(out) > 0 {
		number, kind, n := protowire.ConsumeTag(out)
		if n < 0 {
			t.Fatal("malformed response")
		}
		out = out[n:]
		switch kind {
		case protowire.BytesType:
			body, n = protowire.ConsumeBytes(out)
		case protowire.VarintType:
			numbers[number], n = protowire.ConsumeVarint(out)
		}
		if n < 0 {
			t.Fatal("malformed response")
		}
		out = out[n:]
	}
	return body, numbers
}

// get requests what a guest has asked for at /kbs/v0/external/copilot/PATH, as a KBS does.
func (k kbs) get(t testing.TB, path ...string) (status uint64, body []byte) {
	t.Helper()
	if _, admin := k.call(t, "ValidateAuth", "GET", path...); admin[1] != 0 {
		t.Errorf("%v: only the KBS's admins could read it", path)
	}
	body, numbers := k.call(t, "Handle", "GET", path...)
	if _, encrypted := k.call(t, "NeedsEncryption", "GET", path...); encrypted[1] != 1 {
		t.Errorf("%v: the KBS would not encrypt it for the guest", path)
	}
	return numbers[2], body
}

// layers returns the layers of the image in a layout.
func layers(t testing.TB, dir string) []ocispec.Descriptor {
	t.Helper()
	var index ocispec.Index
	var manifest ocispec.Manifest
	for _, read := range []struct {
		file string
		into any
	}{{"/index.json", &index}, {"", &manifest}} {
		if read.file == "" {
			read.file = "/blobs/sha256/" + index.Manifests[0].Digest.Encoded()
		}
		if err := json.Unmarshal([]byte(harness.Read(t, dir+read.file)), read.into); err != nil {
			t.Fatal(err)
		}
	}
	return manifest.Layers
}

// guest decrypts a layer of an image as a guest of Confidential Containers does, by
// the documents of guest-components, with what get returns for a kid. It returns that kid and
// the layer, decompressed.
func guest(t testing.TB, dir string, layer ocispec.Descriptor, get func(kid string) []byte) (kid, text string) {
	t.Helper()
	blob := []byte(harness.Read(t, dir+"/blobs/sha256/"+layer.Digest.Encoded()))
	decode := func(text string) []byte {
		t.Helper()
		b, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		return b
	}
	unmarshal := func(b []byte, v any) {
		t.Helper()
		if err := json.Unmarshal(b, v); err != nil {
			t.Fatalf("%q: %v", b, err)
		}
	}
	// ocicrypt-rs takes the first annotation of any key provider, in the order of their names.
	const providers = "org.opencontainers.image.enc.keys.provider."
	var value string
	for _, name := range slices.Sorted(maps.Keys(layer.Annotations)) {
		if strings.HasPrefix(name, providers) {
			value = layer.Annotations[name]
			break
		}
	}
	var packet struct {
		KID         string `json:"kid"`
		WrappedData string `json:"wrapped_data"`
		IV          string `json:"iv"`
		WrapType    string `json:"wrap_type"`
	}
	unmarshal(decode(value), &packet)
	if packet.WrapType != "A256GCM" {
		t.Fatalf("annotation %+v", packet)
	}
	block, err := aes.NewCipher(get(packet.KID))
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	opened, err := gcm.Open(nil, decode(packet.IV), decode(packet.WrappedData), nil)
	if err != nil {
		t.Fatalf("a guest does not unwrap the layer key of %s: %v", packet.KID, err)
	}
	var private struct {
		SymKey        []byte `json:"symkey"`
		CipherOptions struct {
			Nonce []byte `json:"nonce"`
		} `json:"cipheroptions"`
	}
	var public struct {
		Cipher string `json:"cipher"`
		HMAC   []byte `json:"hmac"`
	}
	unmarshal(opened, &private)
	unmarshal(decode(layer.Annotations["org.opencontainers.image.enc.pubopts"]), &public)
	mac := hmac.New(sha256.New, private.SymKey)
	mac.Write(blob)
	if public.Cipher != "AES_256_CTR_HMAC_SHA256" || !hmac.Equal(mac.Sum(nil), public.HMAC) {
		t.Errorf("%s: the HMAC of %s does not match", dir, layer.Digest)
	}
	if block, err = aes.NewCipher(private.SymKey); err != nil {
		t.Fatal(err)
	}
	cipher.NewCTR(block, private.CipherOptions.Nonce).XORKeyStream(blob, blob)
	if z, err := gzip.NewReader(bytes.NewReader(blob)); err == nil { // as skopeo may have it
		if blob, err = io.ReadAll(z); err != nil {
			t.Error(err)
		}
	}
	return packet.KID, string(blob)
}

// TestOneImageIsForNodesAndGuestsOfConfidentialContainers encrypts where KEKs may only wrap,
// and decrypts as guests do, with what copilot gives their KBS, and on nodes.
func TestOneImageIsForNodesAndGuestsOfConfidentialContainers(t *testing.T) {
	t.Parallel()
	b := harness.NewTLSBroker(t, "team-a", "team-b")
	b.AddRules(t, `
[[rule]]
identities = ["spiffe://example.com/node/ci"]
keks = ["**"]
actions = ["wrap"]

[[rule]]
identities = ["spiffe://example.com/node/ci", "spiffe://example.com/node/unwraps"]
keks = ["**"]
actions = ["export"]
deny = true

[[rule]]
identities = ["spiffe://example.com/node/kbs"]
keks = ["team-b"]
actions = ["export", "wrap", "unwrap"]
deny = true
`)
	dir := harness.TempDir(t)
	ca := harness.Write(t, dir+"/ca.pem", harness.Read(t, b.Dir+"/ca.pem"))
	as := func(name string) []string {
		t.Helper()
		cert, key := b.Enroll(t, name)
		return []string{"--broker", b.URL(), "--broker-ca", ca,
			"--broker-cert", harness.Write(t, dir+"/"+name+".pem", harness.Read(t, cert)), "--broker-key", harness.Write(t, dir+"/"+name+"-key.pem", harness.Read(t, key))}
	}
	ci, unwraps, exports := as("ci"), as("unwraps"), as("exports")
	cert, key := b.Enroll(t, "kbs")
	secret := harness.NewSecret()
	l := harness.NewLayout(t)
	plain := "oci:" + dir + "/plain:v1"
	l.Write(dir+"/plain", "v1", l.Image(harness.LayerKinds[0], false, harness.Arch, secret))

	const mapped = "kbs:///default/key/team-a"
	mapping := []string{"--kbs-keks", mapped + "=team-a"}
	encrypt := func(name string, args ...string) *exec.Cmd {
		return harness.Command(t, "ctr-pilot", slices.Concat([]string{"images", "encrypt"}, ci, args, []string{plain, "oci:" + dir + "/" + name + ":v1"})...)
	}
	both := encrypt("both", "--recipient", "provider:pilot:team-a", "--recipient", "coco:team-a")
	// CoCo's own key provider does not know copilot's KEKs.
	both.Env = append(os.Environ(), "OCICRYPT_KEYPROVIDER_CONFIG="+harness.Write(t, dir+"/other.conf", `{"key-providers": {"attestation-agent": {"cmd": {"path": "/bin/false"}}}}`))
	harness.Output(t, both)
	// Nor do settings have to be flags.
	settings := encrypt("settings", "--recipient", "coco:team-a")
	settings.Args = append([]string{settings.Args[0], "images", "encrypt"}, settings.Args[3+len(ci):]...)
	settings.Env = append(both.Env, "PILOT_BROKER="+b.URL(), "PILOT_BROKER_CA="+ca, "PILOT_BROKER_CERT="+dir+"/ci.pem", "PILOT_BROKER_KEY="+dir+"/ci-key.pem")
	harness.Output(t, settings)
	harness.Output(t, encrypt("plugin", "--recipient", "coco:team-a"))
	harness.Output(t, encrypt("mapped", append(mapping, "--recipient", "provider:attestation-agent:keyid="+mapped)...))
	// skopeo passes the recipients of both key providers to each.
	executable := func(args ...string) string {
		text, err := json.Marshal(map[string]any{"path": harness.Bin + "/pilot", "args": slices.Concat([]string{"keyprovider"}, ci, mapping, args)})
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	d := harness.NewDebian(t, dir, harness.Write(t, dir+"/ocicrypt.conf", fmt.Sprintf(`{"key-providers": {"pilot": {"cmd": %s}, "attestation-agent": {"cmd": %s}}}`,
		executable(), executable("--provider-name", "attestation-agent"))))
	harness.Output(t, d.Run("skopeo", "copy", "--encryption-key", "provider:pilot:team-a", "--encryption-key", "provider:attestation-agent:"+mapped, plain, "oci:"+dir+"/skopeo:v1"))

	service := newKBS(t, b, cert, key)
	_, answer := harness.RequestOverSocket(t, b.Dir+"/copilot.sock", "GET", "/api/v2/keks/team-a/key", "")
	var kek struct{ Key []byte }
	if err := json.Unmarshal([]byte(answer), &kek); err != nil {
		t.Fatalf("%s: %v", answer, err)
	}
	harness.RotateKEK(t, b.Dir+"/store", "team-a")
	for range 2 { // of which the second one changes nothing
		harness.Output(t, harness.Command(t, "ctr-pilot", slices.Concat([]string{"images", "rewrap"}, exports, []string{"--recipient", "coco:team-a", "oci:" + dir + "/plugin:v1"})...))
	}
	for name, want := range map[string]string{"both": "kbs+external:///copilot/team-a/1", "settings": "kbs+external:///copilot/team-a/1", "plugin": "kbs+external:///copilot/team-a/2", "mapped": mapped, "skopeo": mapped} {
		var all string
		for _, layer := range layers(t, dir+"/"+name) {
			kid, text := guest(t, dir+"/"+name, layer, func(kid string) []byte {
				path, ok := strings.CutPrefix(kid, "kbs+external:///copilot/")
				if !ok {
					return kek.Key // that an admin gave the KBS
				}
				status, body := service.get(t, strings.Split(path, "/")...)
				if status != 200 {
					t.Fatalf("%s: %s: %d %s", name, kid, status, body)
				}
				return body
			})
			if kid != want || strings.Contains(layer.Annotations["org.opencontainers.image.enc.keys.provider.attestation-agent"], ",") {
				t.Errorf("%s: kid %s, want %s, once, in %v", name, kid, want, layer.Annotations)
			}
			all += text
		}
		if !strings.Contains(all, secret) {
			t.Errorf("%s: the secret is not in what a guest decrypted", name)
		}
		if out := harness.Output(t, harness.Command(t, "ctr-pilot", "images", "layerinfo", "--json", "oci:"+dir+"/"+name+":v1")); !strings.Contains(out, want) {
			t.Errorf("%s: layerinfo: %s", name, out)
		}
		for i, node := range [][]string{unwraps, exports} {
			out := fmt.Sprintf("%s/%s-%d", dir, name, i)
			harness.Output(t, harness.Command(t, "ctr-pilot", slices.Concat([]string{"images", "decrypt"}, node, mapping, []string{"oci:" + dir + "/" + name + ":v1", "oci:" + out + ":v1"})...))
			if !strings.Contains(blobs(t, out), secret) {
				t.Errorf("%s: the secret is not in what node %d decrypted", name, i)
			}
		}
	}
	if log := harness.Read(t, b.Dir+"/store/audit.log"); !strings.Contains(log, `"action":"export","kek":"team-a","version":1,"who":"spiffe://example.com/node/kbs"`) {
		t.Errorf("the KBS's exports are not in the audit log:\n%s", log)
	}

	for path, want := range map[string]string{
		"team-a/3":   "404 no such KEK version",
		"nobody/1":   "404 no such KEK",
		"team-b/1":   "403 not allowed",
		"team-a":     "404 it is not KEK/VERSION",
		"team-a/1/x": "404 it is not KEK/VERSION",
		"../team-a":  "404 it is not KEK/VERSION",
	} {
		status, body := service.get(t, strings.Split(path, "/")...)
		code, text, _ := strings.Cut(want, " ")
		if fmt.Sprint(status) != code || !strings.Contains(string(body), text) {
			t.Errorf("%s: %d %s, want %s", path, status, body, want)
		}
	}
	if _, admin := service.call(t, "ValidateAuth", "POST", "team-a", "1"); admin[1] != 1 {
		t.Error("guests could write")
	}
	if body, status := service.call(t, "Handle", "POST", "team-a", "1"); status[2] != 405 {
		t.Errorf("POST: %d %s", status[2], body)
	}
	// What a browser, or a program that fetches URLs for others, can send is not HTTP/2.
	if resp, err := http.Post("http://"+service.address+"/kbs.plugin.v1.KbsPlugin/Handle", "application/grpc", strings.NewReader("\x00\x00\x00\x00\x00")); err == nil {
		t.Errorf("HTTP/1.1 was answered with %s", resp.Status)
		resp.Body.Close()
	}
	// An identity that may unwrap, but not export, can give guests nothing.
	if status, body := newKBS(t, b, dir+"/unwraps.pem", dir+"/unwraps-key.pem").get(t, "team-a", "1"); status != 403 || !bytes.Contains(body, []byte("let this identity export it")) {
		t.Errorf("without the right to export: %d %s", status, body)
	}

	harness.ExpectFailure(t, encrypt("bad", "--recipient", "coco:kbs:///default/key/nobody"), `add "kbs:///default/key/nobody=KEK" to kbs-keks`)
	harness.ExpectFailure(t, encrypt("bad", append(mapping, "--recipient", "coco:"+mapped)...), `is version 1 of KEK "team-a", and its current version is 2`)
	harness.ExpectFailure(t, encrypt("bad", "--kbs-keks", "kbs:///default/team-a=team-a", "--recipient", "coco:team-a"), "is not the URI of a KBS resource")
	harness.ExpectFailure(t, harness.Command(t, "ctr-pilot", slices.Concat([]string{"images", "decrypt"}, exports, []string{"oci:" + dir + "/mapped:v1", "oci:" + dir + "/bad:v1"})...), "to kbs-keks")
	harness.ExpectFailure(t, harness.Command(t, "pilot", slices.Concat([]string{"kbs-plugin"}, exports, []string{"--plugin-listen", "0.0.0.0:50051"})...), "a KBS shows no credentials")
}
