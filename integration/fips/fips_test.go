package fips

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// TestMainJobInFIPSOnlyMode encrypts, pulls, runs, rotates, rewraps and decrypts with a broker
// that is reached over TLS with certificates, and with tokens of an issuer whose keys have
// certificates.
func TestMainJobInFIPSOnlyMode(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	issuer := harness.StartIssuer(t)
	b := harness.NewTLSBroker(t, "team-a")
	b.Process.Stop(t)
	harness.Write(t, b.Dir+"/copilot.toml", harness.Read(t, b.Dir+"/copilot.toml")+fmt.Sprintf("\n[issuers.ci]\nurl = %q\naudience = \"copilot\"\nca = %q\n", issuer.URL, issuer.CA))
	harness.Write(t, b.Dir+"/policy.toml", harness.Read(t, b.Dir+"/policy.toml")+"\n[[rule]]\nidentities = [\"ci:job\"]\nkeks = [\"team-a\"]\nactions = [\"unwrap\", \"export\"]\n")
	b.Start(t)
	cert, key := b.Enroll(t, "node-1")
	tls := []string{"--broker-ca", b.Dir + "/ca.pem", "--broker-cert", cert, "--broker-key", key}

	_, ocicrypt := harness.StartPilot(t, dir+"/ci", b.URL(), tls...)
	c := harness.NewCI(t, dir+"/ci", ocicrypt)
	image := c.Image(harness.LayerKinds[1], "provider:pilot:team-a")
	harness.RotateKEK(t, b.Dir+"/store", "team-a")
	harness.Output(t, c.CtrPilot("images", "rewrap", image))
	harness.Output(t, c.CtrPilot("images", "push", "--plain-http", image))
	if out := harness.Output(t, c.CtrPilot("images", "layerinfo", image)); !strings.Contains(out, "team-a@2") {
		t.Errorf("rewrapped: %s", out)
	}
	harness.Output(t, c.CtrPilot("images", "decrypt", image, "plain:1"))

	home := harness.TempDir(t)
	harness.StartPilot(t, home, b.URL(), append(tls, "--admin-listen", "unix://"+home+"/admin.sock")...)
	n := harness.NewDifferNode(t, home, harness.DifferConfig{Containerd: harness.Containerd2()})
	report := harness.NewDoctorNode(t, n).Examine(t, append([]string{"--broker", b.URL()}, tls...)...)
	details := map[string]string{}
	for _, s := range report.Steps {
		details[s.Name] = s.Result + " " + s.Detail
	}
	if !strings.Contains(details["key-provider"], "fips140=only") || !strings.HasPrefix(details["layer"], "skipped needs a KEK") {
		t.Errorf("doctor: %s", report.Output)
	}
	harness.Output(t, n.Ctr("images", "pull", "--plain-http", image))
	if out := harness.ContainerOutput(t, n.Ctr("run", "--rm", image, harness.ContainerID())); !strings.Contains(out, c.Secrets[image]) {
		t.Errorf("the container said %q", out)
	}

	// What it says of its mode.
	mode, module := "fips140=only", "none"
	if out := harness.Output(t, harness.Command(t, "pilot", "version")); !strings.Contains(out, mode) {
		t.Error(out)
	} else if _, rest, ok := strings.Cut(out, "Go Cryptographic Module "); ok {
		module, _, _ = strings.Cut(rest, ",")
	}
	if want := os.Getenv("GOFIPS140"); want != "" && want != module {
		t.Errorf("pilot has the module %s, not %s", module, want)
	}
	for _, program := range []string{"copilot", "ctr-pilot", "pilot-decoder"} {
		if out := harness.Output(t, harness.Command(t, program, "--version")); !strings.Contains(out, mode) {
			t.Error(out)
		}
	}
	r, err := harness.NewPilotClient(t, home).Admin.Get("http://pilot/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	var metrics bytes.Buffer
	if _, err := metrics.ReadFrom(r.Body); err != nil || !strings.Contains(metrics.String(), fmt.Sprintf("pilot_fips140_info{mode=\"only\",module=%q} 1", module)) {
		t.Errorf("%v: the metrics do not say so", err)
	}
	req, err := http.NewRequest(http.MethodGet, b.URL()+"/api/v2/keks/team-a/key", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+issuer.Token("copilot", harness.Claims{"sub": "job"}))
	conf := b.ClientTLS(t, cert, key)
	conf.Certificates = nil
	client := http.Client{Timeout: harness.Timeout, Transport: &http.Transport{TLSClientConfig: conf}}
	answer, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		t.Errorf("with a token: %s", answer.Status)
	}
}

// TestRefusedInFIPSOnlyMode asserts for all that is refused that a sentence says so, and that
// nothing panics or hangs.
func TestRefusedInFIPSOnlyMode(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	broker, url := harness.StartBroker(t, dir+"/broker", "team-a")
	l := harness.NewLayout(t)
	plain := "oci:" + dir + "/plain:v1"
	l.Write(dir+"/plain", "v1", l.Image(harness.LayerKinds[0], false, harness.Arch, harness.NewSecret()))
	openssl := func(args ...string) { harness.Output(t, harness.Command(t, "openssl", args...)) }
	private, public, certificate := dir+"/key.pem", dir+"/public.pem", dir+"/cert.pem"
	openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-keyout", private, "-out", certificate)
	openssl("pkey", "-in", private, "-pubout", "-out", public)

	encrypt := func(args ...string) *exec.Cmd {
		return harness.Command(t, "ctr-pilot", append(append([]string{"images", "encrypt", "--broker", url}, args...), plain, "oci:"+dir+"/out:v1")...)
	}
	// copilot is started with a configuration.
	copilot := func(settings string, env ...string) *exec.Cmd {
		conf := harness.Write(t, harness.TempDir(t)+"/copilot.toml", fmt.Sprintf("dir = %q\nlisten = [\"unix://%[2]s/refused.sock\"]\n%[3]s", dir+"/refused", dir, settings))
		cmd := harness.Command(t, "copilot", "serve", "--config", conf)
		cmd.Env = append(os.Environ(), env...)
		return cmd
	}
	// unwrap asks the one-shot key provider for a layer key, with keys that are named.
	unwrap := func(keys, annotation string, args ...string) *exec.Cmd {
		cmd := harness.Command(t, "pilot", append([]string{"keyprovider", "--config", "/dev/null", "--broker", url}, args...)...)
		cmd.Stdin = strings.NewReader(fmt.Sprintf(`{"op":"keyunwrap","keyunwrapparams":{"dc":{"Parameters":%s},"annotation":%q}}`, keys, base64.StdEncoding.EncodeToString([]byte(annotation))))
		return cmd
	}
	backend := func(kind, more string) string {
		return fmt.Sprintf("[backends.kms]\ntype = %q\n%s\n[keks.a]\nbackend = 'kms'\npath = 'a'\n", kind, more)
	}
	sha1 := encrypt("--recipient", "pkcs11:"+public)
	sha1.Env = append(os.Environ(), "OCICRYPT_OAEP_HASHALG=sha1")
	const x25519, hybrid = "age1gde3ncmahlqd9gg50tanl99r960llztrhfapnmx853s4tjum03uqfssgdh", "age1pq1"
	original := harness.Write(t, dir+"/original.toml", "annotation-format = \"original\"\n")
	identity := harness.Write(t, dir+"/identity.txt", "AGE-SECRET-KEY-1\n")
	refused := map[fipstest.Refusal][]*exec.Cmd{
		fipstest.JWE:        {encrypt("--recipient", "jwe:"+public)},
		fipstest.PKCS7:      {encrypt("--recipient", "pkcs7:"+certificate)},
		fipstest.PGP:        {encrypt("--recipient", "pgp:somebody@example.com")},
		fipstest.SHA1OAEP:   {sha1},
		fipstest.PrivateKey: {harness.Command(t, "ctr-pilot", "images", "decrypt", "--key", private, plain, "oci:"+dir+"/out:v1")},
		fipstest.Age: {
			encrypt("--recipient", "provider:pilot:"+x25519), encrypt("--recipient", "provider:pilot:"+hybrid),
			unwrap("null", `{"method":"age","recipient":"`+x25519+`","wrappedKey":"AAAA"}`, "--age-identities", identity),
		},
		fipstest.Backup: {
			harness.Command(t, "copilot", "backup", "shares", "--shares", "3", "--threshold", "2", "--out", dir+"/shares"),
			harness.Command(t, "copilot", "backup", "--dir", dir+"/broker", "--recipient", x25519, "--out", dir+"/backup"),
			harness.Command(t, "copilot", "restore", "--dir", dir+"/restored", "--identity", identity, public),
		},
		fipstest.Original: {
			encrypt("--config", original, "--recipient", "provider:pilot:team-a"),
			unwrap(`{"pilot":["dGVhbS1h"]}`, `{"iv":"AAAAAAAAAAAAAAAAAAAAAA==","method":"AES-GCM","wrappedKey":"`+strings.Repeat("A", 64)+`"}`),
		},
		fipstest.TPM:       {copilot(backend("tpm", "device = '/dev/tpmrm0'"))},
		fipstest.AzureCert: {copilot(backend("azure-key-vault", "vault-url = 'https://a.vault.azure.net'"), "AZURE_CLIENT_CERTIFICATE_PATH="+certificate)},
	}
	hpke := harness.NewTLSBroker(t, "team-a").Command(t, "keys", "public", "team-a")
	if strings.Contains(harness.Output(t, harness.Command(t, "copilot", "version")), "Module v1.0.0") {
		refused[fipstest.HPKE] = []*exec.Cmd{hpke}
	} else {
		harness.Output(t, hpke)
	}
	for _, what := range fipstest.All {
		for _, cmd := range refused[what] {
			out := harness.ExpectFailure(t, cmd, fips.ErrNotApproved.Error())
			if strings.Contains(out, "goroutine ") || strings.Contains(out, "arbitrary IVs") || strings.Count(out, fips.ErrNotApproved.Error()) != 1 {
				t.Errorf("%s: %v is not refused with a sentence:\n%s", what, cmd.Args, out)
			}
		}
		if len(refused[what]) == 0 && what != fipstest.HPKE && what != fipstest.MD5 { // which follow
			t.Errorf("nothing shows that %s is refused", what)
		}
	}
	broker.Stop(t)
}

// TestDatabaseInFIPSOnlyMode keeps KEKs in PostgreSQL, where copilot logs in by
// SCRAM-SHA-256 and refuses MD5.
func TestDatabaseInFIPSOnlyMode(t *testing.T) {
	t.Parallel()
	db := harness.StartPostgres(t)
	db.Sql(t, "SET password_encryption = 'md5'; CREATE USER weak PASSWORD 'secret'; SET password_encryption = 'scram-sha-256'; CREATE USER strong PASSWORD 'secret'; GRANT ALL ON SCHEMA public TO strong, weak;")
	harness.Write(t, db.Dir+"/data/pg_hba.conf", "local all weak md5\nlocal all strong scram-sha-256\nlocal all all trust\n")
	db.Reload(t)
	create := func(user string) *exec.Cmd {
		return harness.Command(t, "copilot", "keys", "create", "--dir", harness.TempDir(t), "--database", "postgres://"+user+":secret@/postgres?host="+db.Dir, "kek-of-"+user)
	}
	if out := harness.ExpectFailure(t, create("weak"), `"!md5"`); strings.Contains(out, "goroutine ") {
		t.Errorf("%s", out)
	}
	harness.Output(t, create("strong"))
}
