package encrypt

import (
	"os"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// TestPrivateKeyForms decrypts with private keys in each form that OpenSSL
// writes.
func TestPrivateKeyForms(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.JWE)
	dir := harness.TempDir(t)
	c := harness.NewCI(t, dir+"/ci", harness.Write(t, dir+"/ocicrypt.conf", `{"key-providers": {}}`))
	file := func(name string) string { return dir + "/" + name }
	openssl := func(name string, args ...string) {
		harness.Output(t, harness.Command(t, "openssl", append(args, "-out", file(name))...))
	}
	openssl("ec", "ecparam", "-name", "prime256v1", "-genkey") // after EC PARAMETERS
	openssl("ec-384", "ecparam", "-name", "secp384r1", "-genkey", "-noout")
	openssl("ec-521", "ecparam", "-name", "secp521r1", "-genkey", "-noout")
	openssl("rsa", "genpkey", "-algorithm", "RSA")
	openssl("unrelated", "ecparam", "-name", "prime256v1", "-genkey")

	openssl("ec-der", "ec", "-in", file("ec"), "-outform", "DER")
	openssl("ec-password", "ec", "-in", file("ec"), "-aes256", "-passout", "pass:secret")
	openssl("ec-pkcs8", "pkey", "-in", file("ec"))
	openssl("ec-pkcs8-der", "pkey", "-in", file("ec"), "-outform", "DER")
	openssl("ec-pkcs8-password", "pkcs8", "-topk8", "-in", file("ec"), "-passout", "pass:secret")
	openssl("ec-pkcs8-password-der", "pkcs8", "-topk8", "-in", file("ec"), "-outform", "DER", "-passout", "pass:secret")
	openssl("rsa-pkcs1", "rsa", "-in", file("rsa"), "-traditional")
	openssl("rsa-pkcs1-der", "rsa", "-in", file("rsa"), "-traditional", "-outform", "DER")
	openssl("rsa-pkcs1-password", "rsa", "-in", file("rsa"), "-traditional", "-aes128", "-passout", "pass:secret")
	openssl("rsa-pkcs8-sha1", "pkcs8", "-topk8", "-in", file("rsa"), "-v2", "aes-128-cbc", "-v2prf", "hmacWithSHA1", "-passout", "pass:secret")
	openssl("rsa-pkcs8-sha512", "pkcs8", "-topk8", "-in", file("rsa"), "-v2", "aes-192-cbc", "-v2prf", "hmacWithSHA512", "-iter", "100000", "-passout", "pass:secret")
	openssl("rsa-pkcs8-scrypt", "pkcs8", "-topk8", "-in", file("rsa"), "-scrypt", "-passout", "pass:secret")
	harness.Write(t, file("password"), "secret")

	var recipients []string
	for _, key := range []string{"ec", "ec-384", "ec-521", "rsa"} {
		openssl(key+".pub", "pkey", "-in", file(key), "-pubout")
		recipients = append(recipients, "jwe:"+file(key+".pub"))
	}
	image := c.Image(harness.LayerKinds[1], recipients...)
	decrypted := image + "-decrypted"
	for _, key := range []string{
		"ec", "ec-384", "ec-521", "ec-der", "ec-pkcs8", "ec-pkcs8-der", "rsa", "rsa-pkcs1", "rsa-pkcs1-der",
		"ec-password:secret", "ec-password:pass=secret", "rsa-pkcs1-password:secret",
		"ec-pkcs8-password:secret", "ec-pkcs8-password:file=" + file("password"), "ec-pkcs8-password-der:secret", "rsa-pkcs8-sha1:secret", "rsa-pkcs8-sha512:secret",
	} {
		t.Run(key, func(t *testing.T) {
			harness.Output(t, c.CtrPilot("images", "decrypt", "--key", file(key), image, decrypted))
			if got, want := c.Target(decrypted), c.Target(image+"-plain"); got != want {
				t.Errorf("decrypted to %s, was %s", got, want)
			}
			harness.Output(t, c.CtrPilot("images", "rm", decrypted))
		})
	}
	for key, want := range map[string]string{
		"unrelated":               "layer sha256:",
		"ec-password":             "the private key has a password: give it as FILE:pass=PASSWORD",
		"ec-password:wrong":       "the password is wrong",
		"ec-pkcs8-password":       "the private key has a password: give it as FILE:pass=PASSWORD",
		"ec-pkcs8-password:wrong": "the password is wrong",
		"rsa-pkcs8-scrypt:secret": "openssl pkcs8 -topk8 -v2 aes-256-cbc",
	} {
		harness.ExpectFailure(t, c.CtrPilot("images", "decrypt", "--key", file(key), image, decrypted), want)
	}

	// To add a recipient, too, beside a key that needs no conversion.
	harness.Output(t, c.CtrPilot("images", "encrypt", "--recipient", recipients[3], "--key", file("ec"), image, image+"-more"))
	harness.Output(t, c.CtrPilot("images", "decrypt", "--key", file("unrelated"), "--key", file("rsa"), image+"-more", decrypted))

	// Among the keys of a node.
	home := harness.TempDir(t)
	harness.Output(t, harness.Command(t, "install", "-D", "-m", "0600", file("ec"), home+"/keys/ec.pem"))
	harness.StartPilot(t, home, "unix://"+home+"/nobody.sock", "--decryption-keys-path", home+"/keys")
	n := harness.NewDifferNode(t, home, harness.DifferConfig{Containerd: harness.Containerd2()})
	harness.Output(t, n.Crictl("pull", image))
	if err := os.Rename(file("unrelated"), home+"/keys/ec.pem"); err != nil {
		t.Fatal(err)
	}
	harness.Output(t, n.Crictl("rmi", image))
	harness.ExpectFailure(t, n.Crictl("pull", image), "no key unwraps the layer key")
}
