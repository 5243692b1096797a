package encrypt

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/go-jose/go-jose/v4"
	"github.com/rogpeppe/go-internal/testscript"
)

// TestImgcryptScript runs what imgcrypt's own script/tests/test_encryption.sh runs,
// with ctr-pilot for its ctr-enc and pilot-decoder for its ctd-decoder: the scripts
// in testdata/imgcrypt, each with a containerd of its own.
func TestImgcryptScript(t *testing.T) {
	harness.Long(t)
	fipstest.Refused(t, fipstest.JWE)
	dir := harness.TempDir(t)
	// Keys in an HSM take a pilot-decoder that is built with cgo, as PKCS11=1 does.
	harness.GoBuild(t, "", dir+"/pilot-decoder", "./cmd/pilot-decoder")
	keys := dir + "/keys"
	imgcryptKeys(t, keys)
	_, brokerURL := harness.StartBroker(t, dir+"/broker", "foobar")
	provider := harness.Write(t, dir+"/ocicrypt-keyprovider.conf", fmt.Sprintf(
		`{"key-providers": {"testkeyprovider": {"cmd": {"path": "%s/pilot", "args": ["keyprovider", "--provider-name", "testkeyprovider", "--broker", "%s"]}}}}`, harness.Bin, brokerURL))
	address, _ := harness.StartRegistry(t, dir)
	imgcryptImages(t, dir+"/push", address)

	scripts, err := filepath.Glob("../testdata/imgcrypt/*.txt")
	if err != nil || len(scripts) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, script := range scripts {
		name := strings.TrimSuffix(filepath.Base(script), ".txt")
		t.Run(name, func(t *testing.T) {
			home := harness.TempDir(t)
			n := imgcryptNode(t, home, dir+"/pilot-decoder", name == "local-keys")
			container := harness.ContainerID()
			t.Cleanup(func() { // where a script failed halfway
				n.Ctr("container", "rm", container).Run()
			})
			testscript.Run(t, testscript.Params{
				Files: []string{script},
				Setup: func(env *testscript.Env) error {
					for key, value := range map[string]string{
						"SOCKET": n.Socket, "GOARCH": harness.Arch, "CTR": "ctr-pilot -a " + n.Socket, "KEYS": keys, "LOCAL_KEYS": home + "/keys", "CONTAINER": container, "PROVIDER": provider,
						"OCICRYPT_CONFIG": "internal", "OCICRYPT_OAEP_HASHALG": "sha1", "SOFTHSM2_CONF": keys + "/hsm/softhsm2.conf",
						"ALPINE": address + "/alpine:latest", "NGINX": address + "/nginx:latest", "BASH": address + "/bash:latest", "REPOSITORY": address + "/alpine",
						"ENC": address + "/alpine:enc", "DEC": address + "/alpine:dec", "NGINX_ENC": address + "/nginx:enc", "NGINX_DEC": address + "/nginx:dec", "BASH_ENC": address + "/bash:enc",
						"PATH": os.Getenv("PATH"), "HOME": env.WorkDir,
					} {
						env.Setenv(key, value)
					}
					return nil
				},
				Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
					"ctr":              scriptCtr,
					"encryption":       scriptEncryption,
					"same":             scriptSame,
					"remove-snapshots": scriptRemoveSnapshots,
				},
			})
		})
	}
}

// imgcryptNode starts a containerd whose stream processors are set up as imgcrypt's
// script does.
func imgcryptNode(t testing.TB, dir, decoder string, localKeys bool) *harness.Node {
	t.Helper()
	conf := "disabled_plugins = ['io.containerd.grpc.v1.cri']\n"
	for _, compression := range []string{"", ".gzip", ".zstd"} {
		mediaType := "application/vnd.oci.image.layer.v1.tar" + strings.Replace(compression, ".", "+", 1)
		conf += fmt.Sprintf("[stream_processors.'io.containerd.ocicrypt.decoder.v1.tar%s']\n  accepts = ['%s+encrypted']\n  returns = '%s'\n  path = '%s'\n", compression, mediaType, mediaType, decoder)
		if localKeys {
			conf += fmt.Sprintf("  args = ['--decryption-keys-path', '%s/keys']\n", dir)
		}
	}
	if err := os.MkdirAll(dir+"/keys", 0o700); err != nil {
		t.Fatal(err)
	}
	// The settings are at the top of the file, before its first table.
	top, tables, _ := strings.Cut(conf, "\n")
	t.Setenv("OCICRYPT_CONFIG", "internal")
	t.Setenv("OCICRYPT_OAEP_HASHALG", "sha1")
	v := harness.Containerd2()
	n := &harness.Node{T: t, Dir: dir, Socket: filepath.Join(dir, "containerd.sock"), ContainerdVersion: v}
	harness.Write(t, filepath.Join(dir, "config.toml"), fmt.Sprintf("version = %d\nroot = '%s/root'\nstate = '%s/state'\n%s\n[grpc]\n  address = '%s'\n%s", v.Number, dir, dir, top, n.Socket, tables))
	n.Start(t)
	return n
}

// imgcryptImages pushes the images that the scripts pull: one of several platforms,
// a large one, and a small one.
func imgcryptImages(t testing.TB, dir, address string) {
	t.Helper()
	n := harness.StartNode(t, dir, harness.Containerd2(), "", "")
	echo := harness.Read(t, harness.Bin+"/hello")
	large := make([]byte, 6<<20)
	rand.Read(large)
	for name, architectures := range map[string][]string{"alpine": {harness.Arch, "s390x", "ppc64le"}, "nginx": {harness.Arch, "s390x"}, "bash": {harness.Arch}} {
		l := harness.NewLayout(t)
		var manifests []harness.Object
		for _, arch := range architectures {
			files := map[string][]byte{"bin/echo": []byte(echo), "secret": []byte("Hello world")}
			first, firstID := l.Layer(harness.LayerKinds[1], harness.LayerKinds[1].OCI, files)
			second, secondID := l.Layer(harness.LayerKinds[1], harness.LayerKinds[1].OCI, map[string][]byte{"arch": []byte(name + arch)})
			if name == "nginx" {
				second, secondID = l.Layer(harness.LayerKinds[1], harness.LayerKinds[1].OCI, map[string][]byte{"large": append([]byte(arch), large...)})
			}
			config := l.JSON("application/vnd.oci.image.config.v1+json", harness.Object{"architecture": arch, "os": "linux", "rootfs": harness.Object{"type": "layers", "diff_ids": []string{firstID, secondID}}})
			m := l.JSON("application/vnd.oci.image.manifest.v1+json", harness.Object{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": []harness.Object{first, second}})
			m["platform"] = harness.Object{"architecture": arch, "os": "linux"}
			manifests = append(manifests, m)
		}
		index := l.JSON("application/vnd.oci.image.index.v1+json", harness.Object{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests})
		ref := address + "/" + name + ":latest"
		harness.Output(t, n.CtrPilot("images", "import", "--no-unpack", "--all-platforms", l.Tar(dir+"/"+name+".tar", ref, index)))
		harness.Output(t, n.CtrPilot("images", "push", "--plain-http", ref))
	}
	n.Stop(t)
}

// imgcryptKeys makes the keys that the scripts encrypt for, with the programs and in
// the formats of imgcrypt's script.
func imgcryptKeys(t testing.TB, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir+"/gpg", 0o700); err != nil {
		t.Fatal(err)
	}
	run := func(line string) {
		cmd := harness.Command(t, "sh", "-ec", line)
		cmd.Dir = dir
		harness.Output(t, cmd)
	}
	for _, name := range []string{"mykey", "mykey2", "client", "client2"} {
		run("openssl genrsa -out " + name + ".pem 2048; openssl rsa -in " + name + ".pem -pubout -out " + name + ".pub.pem")
	}
	run(`openssl rsa -in mykey.pem -outform der -out mykey.der -traditional
		openssl rsa -in mykey.pem -pubout -outform der -out mykey.pub.der
		openssl pkcs8 -topk8 -nocrypt -in mykey.pem -out mykeypk8.pem
		openssl pkcs8 -topk8 -nocrypt -in mykey.pem -outform der -out mykeypk8.der
		openssl genrsa -traditional -aes256 -passout pass:1234 -out mykey3pass.pem 2048
		openssl rsa -in mykey3pass.pem -passin pass:1234 -pubout -out mykey3.pub.pem
		openssl ecparam -genkey -out eckey.der -outform der -name secp521r1
		openssl ec -in eckey.der -inform der -pubout -outform der -out eckey.pub.der
		openssl req -newkey rsa:2048 -x509 -days 365 -nodes -keyout ca-key.pem -out ca.pem -subj /CN=foo/
		for c in client client2; do
			openssl req -new -key $c.pem -out $c.csr -subj /CN=bar/
			openssl x509 -req -in $c.csr -CA ca.pem -CAkey ca-key.pem -CAcreateserial -out $c-cert.pem -days 10 -sha256
		done`)
	t.Cleanup(func() { exec.Command("gpgconf", "--homedir", dir+"/gpg", "--kill", "all").Run() })
	for _, name := range []string{"testkey1", "testkey2"} {
		// ocicrypt asks gpg for a key by its ID without leading zeros, by which gpg finds none.
		run(`until case ${id-0} in 0*) false ;; esac; do
				[ -z "${fpr-}" ] || gpg --homedir gpg --batch --yes --delete-secret-and-public-key $fpr
				gpg --homedir gpg --batch --passphrase '' --quick-gen-key "` + name + ` <` + name + `@key.org>" rsa2048 default never
				fpr=$(gpg --homedir gpg --batch --with-colons --list-keys ` + name + `@key.org | awk -F: '/^fpr/ {print $10; exit}')
				gpg --homedir gpg --batch --passphrase '' --quick-add-key $fpr rsa2048 encr never
				id=$(gpg --homedir gpg --batch --with-colons --list-keys ` + name + `@key.org | awk -F: '/^sub/ {print tolower($5)}')
			done
			gpg --homedir gpg --batch --export-secret-keys ` + name + `@key.org >` + name + `.gpg
			echo 0x$id >` + name + `.id`)
	}
	// One key of RSA in three spellings, and one of EC.
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, k := range map[string]struct {
		crypto.Signer
		algorithm jose.KeyAlgorithm
	}{"jwk1": {key, ""}, "jwk2": {key, jose.RSA_OAEP}, "jwk3": {key, jose.RSA_OAEP_256}, "jwk-ec": {ec, jose.ECDH_ES_A128KW}} {
		for file, value := range map[string]any{name: k.Signer, name + ".pub": k.Public()} {
			text, err := json.Marshal(jose.JSONWebKey{Key: value, Algorithm: string(k.algorithm)})
			if err != nil {
				t.Fatal(err)
			}
			harness.Write(t, filepath.Join(dir, file), string(text))
		}
	}
	run("cp " + harness.ImportHSMKey(t, dir+"/hsm", dir+"/mykey2.pem") + " hsm.yaml; cp mykey2.pub.pem hsm.pub.pem")
}

// scriptCtr runs ctr-pilot on the script's containerd.
func scriptCtr(ts *testscript.TestScript, neg bool, args []string) {
	err := ts.Exec("ctr-pilot", append([]string{"-a", ts.Getenv("SOCKET")}, args...)...)
	if neg != (err != nil) {
		ts.Fatalf("ctr-pilot %s: %v", strings.Join(args, " "), err)
	}
}

// columns returns those of layerinfo's table, without its heading.
func columns(ts *testscript.TestScript, args ...string) (rows [][]string) {
	scriptCtr(ts, false, append([]string{"images", "layerinfo"}, args...))
	lines := strings.Split(strings.TrimSpace(ts.ReadFile("stdout")), "\n")
	for _, line := range lines[1:] {
		rows = append(rows, strings.Fields(line))
	}
	return rows
}

// scriptEncryption is "encryption IMAGE PLAIN SCHEMES": the layers of IMAGE are of the
// platforms of PLAIN's, and those that are encrypted are so in these ways. Those of
// another platform than that which was pulled stay plain.
func scriptEncryption(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("encryption IMAGE PLAIN SCHEMES")
	}
	got, want := columns(ts, args[0]), columns(ts, args[1])
	schemes := make(map[string]bool)
	for i, row := range got {
		if len(got) != len(want) || row[2] != want[i][2] {
			ts.Fatalf("layers of %v, want %v", got, want)
		}
		if len(row) > 4 {
			schemes[row[4]] = true
		}
	}
	if list := slices.Sorted(maps.Keys(schemes)); len(list) != 1 || list[0] != args[2] {
		ts.Fatalf("encrypted with %q, want %q", list, args[2])
	}
}

// scriptSame is "same IMAGE OTHER": layerinfo prints the same of both.
func scriptSame(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("same IMAGE OTHER")
	}
	if a, b := fmt.Sprint(columns(ts, args[0])), fmt.Sprint(columns(ts, args[1])); a != b {
		ts.Fatalf("%s is\n%s\nand %s is\n%s", args[0], a, args[1], b)
	}
}

// scriptRemoveSnapshots removes all snapshots, children first.
func scriptRemoveSnapshots(ts *testscript.TestScript, _ bool, _ []string) {
	for range 100 {
		scriptCtr(ts, false, []string{"snapshots", "ls"})
		lines := strings.Split(strings.TrimSpace(ts.ReadFile("stdout")), "\n")[1:]
		if len(lines) == 0 {
			return
		}
		for _, line := range lines {
			ts.Exec("ctr-pilot", "-a", ts.Getenv("SOCKET"), "snapshots", "rm", strings.Fields(line)[0])
		}
	}
	ts.Fatalf("snapshots can't be removed")
}
