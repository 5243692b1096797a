package encrypt

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// annotations returns pilot's annotations of the first layer of the image in a layout.
func annotations(t testing.TB, dir string) []wireformat.Annotation {
	t.Helper()
	blob := func(d ocispec.Descriptor, v any) {
		t.Helper()
		if err := json.Unmarshal([]byte(harness.Read(t, dir+"/blobs/sha256/"+d.Digest.Encoded())), v); err != nil {
			t.Fatal(err)
		}
	}
	var index ocispec.Index
	var manifest ocispec.Manifest
	if err := json.Unmarshal([]byte(harness.Read(t, dir+"/index.json")), &index); err != nil {
		t.Fatal(err)
	}
	blob(index.Manifests[0], &manifest)
	var all []wireformat.Annotation
	for value := range strings.SplitSeq(manifest.Layers[0].Annotations["org.opencontainers.image.enc.keys.provider.pilot"], ",") {
		text, err := base64.StdEncoding.DecodeString(value)
		if err != nil {
			t.Fatal(err)
		}
		list, err := wireformat.ParseAnnotation(text)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, list...)
	}
	return all
}

// withoutNetwork returns a command in a network of its own, where nothing is, not even
// loopback, and with no variables but those that are given.
func withoutNetwork(t testing.TB, variables []string, name string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := harness.Command(t, "unshare", append([]string{"--net", name}, args...)...)
	cmd.Env = append([]string{"PATH=" + harness.Bin + ":/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + t.TempDir()}, variables...)
	return cmd
}

// TestRunnerWithoutNetworkEncryptsForAPublicKey encrypts with what "copilot keys public"
// has printed, where no broker can be reached, and decrypts on machines that may export
// the KEK, and that may only unwrap.
func TestRunnerWithoutNetworkEncryptsForAPublicKey(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.HPKE)
	b := harness.NewTLSBroker(t, "team-a", "team-b", "team-d")
	b.AddRules(t, `
[[rule]]
identities = ["spiffe://example.com/node/unwraps"]
keks = ["**"]
actions = ["export"]
deny = true
`)
	dir := harness.TempDir(t)
	public := func(kek string) string {
		t.Helper()
		return harness.Write(t, dir+"/"+kek+".pub", harness.Output(t, b.Command(t, "keys", "public", kek)))
	}
	file := public("team-a")
	ca := harness.Write(t, dir+"/ca.pem", harness.Read(t, b.Dir+"/ca.pem"))
	conf := harness.Write(t, dir+"/pilot.toml", fmt.Sprintf("public-keys = [%q]\npublic-keys-ca = %q\n", file, ca))
	byExecutable := "OCICRYPT_KEYPROVIDER_CONFIG=" + harness.Write(t, dir+"/ocicrypt.conf", fmt.Sprintf(
		`{"key-providers": {"pilot": {"cmd": {"path": "%s/pilot", "args": ["keyprovider", "--config", "%s"]}}}}`, harness.Bin, conf))
	secret := harness.NewSecret()
	l := harness.NewLayout(t)
	plain := "oci:" + dir + "/plain:v1"
	l.Write(dir+"/plain", "v1", l.Image(harness.LayerKinds[0], false, harness.Arch, secret))

	encrypt := func(args ...string) []string { return append([]string{"images", "encrypt"}, args...) }
	for name, cmd := range map[string]*exec.Cmd{
		"provider":   withoutNetwork(t, nil, "ctr-pilot", encrypt("--config", conf, "--recipient", "provider:pilot:team-a", plain, "oci:"+dir+"/provider:v1")...),
		"executable": withoutNetwork(t, []string{byExecutable}, "ctr-pilot", encrypt("--recipient", "provider:pilot:team-a", plain, "oci:"+dir+"/executable:v1")...),
		"hpke":       withoutNetwork(t, nil, "ctr-pilot", encrypt("--public-keys-ca", ca, "--recipient", "hpke:"+file, plain, "oci:"+dir+"/hpke:v1")...),
	} {
		harness.Output(t, cmd)
		if strings.Contains(blobs(t, dir+"/"+name), secret) {
			t.Errorf("%s: the secret is in what was written", name)
		}
		if list := annotations(t, dir+"/"+name); len(list) != 1 || list[0].Method != wireformat.MethodHPKE || list[0].KEKID != "team-a" || list[0].KEKVersion != 1 {
			t.Errorf("%s: %+v", name, list)
		}
		if out := harness.Output(t, harness.Command(t, "ctr-pilot", "images", "layerinfo", "--json", "oci:"+dir+"/"+name+":v1")); !strings.Contains(out, `"team-a@1"`) {
			t.Errorf("%s: layerinfo: %s", name, out)
		}
	}
	// skopeo has a root directory of its own, in which it sees dir and the programs.
	d := harness.NewDebian(t, dir, dir+"/ocicrypt.conf")
	skopeo := d.Run("skopeo", "copy", "--encryption-key", "provider:pilot:team-a", plain, "oci:"+dir+"/skopeo:v1")
	skopeo.Args = append([]string{"unshare", "--net"}, skopeo.Args...)
	if skopeo.Path, _ = exec.LookPath("unshare"); skopeo.Path == "" {
		t.Fatal("there is no unshare")
	}
	harness.Output(t, skopeo)

	harness.RotateKEK(t, b.Dir+"/store", "team-a")
	for _, who := range []string{"exports", "unwraps"} {
		cert, key := b.Enroll(t, who)
		node := []string{"--broker", b.URL(), "--broker-ca", ca, "--broker-cert", cert, "--broker-key", key}
		if who == "unwraps" {
			harness.Await(t, "the policy", func() error {
				if status, answer := b.Request(t, cert, key, "GET", "/api/v2/keks/team-a/key", ""); status != 409 {
					return fmt.Errorf("%d %s", status, answer)
				}
				return nil
			})
		}
		for _, name := range []string{"provider", "executable", "hpke", "skopeo"} {
			out := dir + "/" + who + "-" + name
			harness.Output(t, harness.Command(t, "ctr-pilot", append(append([]string{"images", "decrypt"}, node...), "oci:"+dir+"/"+name+":v1", "oci:"+out+":v1")...))
			if !strings.Contains(blobs(t, out), secret) {
				t.Errorf("%s: the secret is not in what a machine decrypted that %s", name, who)
			}
		}
		if who == "exports" {
			continue
		}
		// The image moves to the current version, and to what brokers write.
		harness.Output(t, harness.Command(t, "ctr-pilot", append(append([]string{"images", "rewrap"}, "--broker", "unix://"+b.Dir+"/copilot.sock"), "oci:"+dir+"/hpke:v1")...))
		if list := annotations(t, dir+"/hpke"); len(list) != 1 || list[0].Method != wireformat.MethodA256GCMKW || list[0].KEKVersion != 2 {
			t.Errorf("rewrapped: %+v", list)
		}
		harness.Output(t, harness.Command(t, "ctr-pilot", append(append([]string{"images", "rewrap"}, "--broker", "unix://"+b.Dir+"/copilot.sock", "--public-keys-ca", ca,
			"--recipient", "hpke:"+public("team-b")), "oci:"+dir+"/hpke:v1")...))
		if list := annotations(t, dir+"/hpke"); len(list) != 2 || list[0].KEKVersion != 2 || list[1].Method != wireformat.MethodHPKE || list[1].KEKID != "team-b" {
			t.Errorf("with another recipient: %+v", list)
		}
	}

	// A directory in which one file is damaged.
	keys := dir + "/keys"
	good := harness.Write(t, keys+"/team-a.pub", harness.Output(t, b.Command(t, "keys", "public", "--for", "20d", "team-a")))
	damaged := harness.Write(t, keys+"/other.pub", strings.Replace(harness.Read(t, public("team-b")), "KEK-Version: 1", "KEK-Version: one", 1))
	truncated := harness.Write(t, keys+"/team-c.pub", "-----BEGIN PILOT PUBLIC KEY-----\n")
	cert, key := b.Enroll(t, "encrypts")
	withDirectory := harness.Write(t, dir+"/directory.toml", fmt.Sprintf("public-keys = [%q]\npublic-keys-ca = %q\nbroker = %q\nbroker-ca = %q\nbroker-cert = %q\nbroker-key = %q\n", keys, ca, b.URL(), ca, cert, key))
	for kek, want := range map[string]string{"team-a": "", "team-b": damaged, "team-c": truncated, "team-d": ""} {
		cmd := harness.Command(t, "ctr-pilot", encrypt("--config", withDirectory, "--recipient", "provider:pilot:"+kek, plain, "oci:"+dir+"/directory-"+kek+":v1")...)
		if want == "" {
			harness.Output(t, cmd)
		} else {
			harness.ExpectFailure(t, cmd, fmt.Sprintf("KEK %q: no file of public-keys that can be used is for it", kek), want)
		}
	}
	result, detail := examined(t, "public-keys", "--config", withDirectory)
	for _, want := range []string{damaged + " can't be used: ", truncated + " can't be used: ", fmt.Sprintf("the public key of KEK \"team-a\" in %s expires on ", good)} {
		if result != "failed" || !strings.Contains(detail, want) {
			t.Errorf("doctor: %s %s, want %q", result, detail, want)
		}
	}

	other := harness.NewTLSBroker(t, "team-a")
	edited := harness.Write(t, dir+"/edited.pub", strings.Replace(harness.Read(t, file), "KEK-Version: 1", "KEK-Version: 2", 1))
	unsigned, _, _ := strings.Cut(harness.Read(t, file), "-----BEGIN PILOT SIGNATURE")
	for want, args := range map[string][]string{
		"it is another broker's: spiffe://example.com/copilot/public-keys signed it": {"--public-keys-ca", other.Dir + "/ca.pem", "--recipient", "hpke:" + file},
		"it was changed after it was signed":                                         {"--public-keys-ca", ca, "--recipient", "hpke:" + edited},
		"it is not signed":                                                           {"--public-keys-ca", ca, "--recipient", "hpke:" + harness.Write(t, dir+"/unsigned.pub", unsigned)},
		"public-keys-ca is not set":                                                  {"--recipient", "hpke:" + file},
		"it is not the file of a public key":                                         {"--public-keys-ca", ca, "--recipient", "hpke:" + ca},
		"broker is not set: set it":                                                  {"--public-keys-ca", ca, "--recipient", "hpke:" + file, "--recipient", "provider:pilot:team-b"},
		"it takes a broker, and broker is not":                                       {"--config", conf, "--recipient", "provider:pilot:team-b"},
		"are mutually exclusive":                                                     {"--config", conf, "--annotation-format", "original", "--recipient", "provider:pilot:team-a"},
	} {
		harness.ExpectFailure(t, withoutNetwork(t, nil, "ctr-pilot", encrypt(append(args, plain, "oci:"+dir+"/refused:v1")...)...), want)
	}
}

// TestSkopeoEncryptsForRecipientsOfAge has skopeo and ctr-pilot wrap for recipients of age,
// with no broker, and age's own program unwrap what they wrote.
func TestSkopeoEncryptsForRecipientsOfAge(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.Age)
	dir := harness.TempDir(t)
	harness.GoBuild(t, "", dir+"/", "filippo.io/age/cmd/age", "filippo.io/age/cmd/age-keygen")
	identity := func(name string, args ...string) (file, to string) {
		t.Helper()
		file = dir + "/" + name
		harness.Output(t, harness.Command(t, dir+"/age-keygen", append(args, "-o", file)...))
		return file, strings.TrimSpace(harness.Output(t, harness.Command(t, dir+"/age-keygen", "-y", file)))
	}
	key, to := identity("x25519.txt")
	pqKey, pq := identity("pq.txt", "-pq")
	conf := harness.Write(t, dir+"/pilot.toml", fmt.Sprintf("age-identities = [%q, %q]\n", key, pqKey))
	ocicrypt := func(name, conf string) string {
		return harness.Write(t, dir+"/"+name+".conf", fmt.Sprintf(`{"key-providers": {"pilot": {"cmd": {"path": "%s/pilot", "args": ["keyprovider", "--config", "%s"]}}}}`, harness.Bin, conf))
	}
	d := harness.NewDebian(t, dir, ocicrypt("ci", harness.Write(t, dir+"/empty.toml", "")))
	holder := &harness.Debian{T: t, Root: d.Root, Ocicrypt: ocicrypt("holder", conf)}
	secret := harness.NewSecret()
	l := harness.NewLayout(t)
	plain := "oci:" + dir + "/plain:v1"
	l.Write(dir+"/plain", "v1", l.Image(harness.LayerKinds[0], false, harness.Arch, secret))

	for name, one := range map[string]struct{ key, to string }{"x25519": {key, to}, "pq": {pqKey, pq}} {
		bySkopeo, byPilot := dir+"/skopeo-"+name, dir+"/pilot-"+name
		harness.Output(t, d.Run("skopeo", "copy", "--encryption-key", "provider:pilot:"+one.to, plain, "oci:"+bySkopeo+":v1"))
		harness.Output(t, withoutNetwork(t, nil, "ctr-pilot", "images", "encrypt", "--recipient", "provider:pilot:"+one.to, plain, "oci:"+byPilot+":v1"))
		for _, encrypted := range []string{bySkopeo, byPilot} {
			list := annotations(t, encrypted)
			if len(list) != 1 || list[0].Method != wireformat.MethodAge || list[0].Recipient != one.to {
				t.Fatalf("%s: %+v", encrypted, list)
			}
			cmd := harness.Command(t, dir+"/age", "-d", "-i", one.key)
			cmd.Stdin = strings.NewReader(string(list[0].WrappedKey))
			if out := harness.Output(t, cmd); !strings.Contains(out, `"symkey"`) {
				t.Errorf("%s: age unwraps %q", encrypted, out)
			}
			harness.Output(t, holder.Run("skopeo", "copy", "--decryption-key", "provider:pilot:"+one.to, "oci:"+encrypted+":v1", "oci:"+encrypted+"-out:v1"))
			harness.Output(t, harness.Command(t, "ctr-pilot", "images", "decrypt", "--config", conf, "oci:"+encrypted+":v1", "oci:"+encrypted+"-out2:v1"))
			for _, out := range []string{"-out", "-out2"} {
				if !strings.Contains(blobs(t, encrypted+out), secret) {
					t.Errorf("the secret is not in %s%s", encrypted, out)
				}
			}
		}
		harness.ExpectFailure(t, d.Run("skopeo", "copy", "--decryption-key", "provider:pilot:"+one.to, "oci:"+byPilot+":v1", "oci:"+dir+"/no:v1"), "age-identities is not set")
	}

	// Others may read one of the files.
	if err := os.Chmod(key, 0o644); err != nil {
		t.Fatal(err)
	}
	open := fmt.Sprintf("other users may read the private keys in %s (mode 0644): chmod 0600 it", key)
	if result, detail := examined(t, "age-identities", "--config", conf, "--broker", "unix:///nowhere.sock"); result != "warning" || !strings.Contains(detail, open) || strings.Contains(detail, pqKey) {
		t.Errorf("doctor: %s %s", result, detail)
	}
	opened := harness.Command(t, "ctr-pilot", "images", "decrypt", "--config", conf, "oci:"+dir+"/pilot-x25519:v1", "oci:"+dir+"/opened:v1")
	if out, err := opened.CombinedOutput(); err != nil || strings.Count(string(out), "other users may read") != 1 || !strings.Contains(string(out), "mode 0644") {
		t.Errorf("no warning of %s: %v %s", key, err, out)
	}

	// Recipients are exchanged and removed by their names.
	rewrap := func(args ...string) []wireformat.Annotation {
		t.Helper()
		harness.Output(t, harness.Command(t, "ctr-pilot", append(append([]string{"images", "rewrap", "--config", conf}, args...), "oci:"+dir+"/pilot-pq:v1")...))
		return annotations(t, dir+"/pilot-pq")
	}
	before := annotations(t, dir+"/pilot-pq")[0].WrappedKey
	if list := rewrap(); len(list) != 1 || string(list[0].WrappedKey) != string(before) {
		t.Error("rewrap changes what is wrapped for age")
	}
	if list := rewrap("--from", pq, "--to", to); len(list) != 1 || list[0].Recipient != to {
		t.Errorf("moved: %+v", list)
	}
	if out := harness.Output(t, harness.Command(t, "ctr-pilot", "images", "layerinfo", "oci:"+dir+"/pilot-pq:v1")); !strings.Contains(out, to) {
		t.Errorf("layerinfo: %s", out)
	}
	for want, recipient := range map[string]string{
		"is not a recipient of age":             to[:len(to)-2],
		"a private key of age is named as a re": strings.TrimSpace(harness.Output(t, harness.Command(t, "grep", "AGE-", key))),
	} {
		harness.ExpectFailure(t, d.Run("skopeo", "copy", "--encryption-key", "provider:pilot:"+recipient, plain, "oci:"+dir+"/refused:v1"), want)
	}
}

// examined returns the result of a step of the doctor, on a machine where others fail.
func examined(t testing.TB, step string, args ...string) (result, detail string) {
	t.Helper()
	cmd := harness.Command(t, "pilot", append([]string{"node", "doctor", "--json"}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, _ := cmd.Output()
	var report harness.DoctorReport
	if err := json.Unmarshal(out, &report); err != nil {
		t.Fatalf("%v: %s%s", err, out, stderr.Bytes())
	}
	for _, s := range report.Steps {
		if s.Name == step {
			return s.Result, s.Detail
		}
	}
	t.Fatalf("there is no step %s: %s", step, out)
	return "", ""
}
