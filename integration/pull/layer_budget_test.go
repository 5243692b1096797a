package pull

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"

	keyproviderconfig "github.com/containers/ocicrypt/config/keyprovider-config"
	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/processor"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
	"github.com/ctrlplane/pilot/processor/ocicryptclient/grpcdial"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestLayerBudget has pilot unwrap the key of a layer that names 4,096 KEKs, and of
// layers with as many recipients as there can be, of which the last is the right one.
func TestLayerBudget(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	const name = "budget"
	const keys = processor.AnnotationPrefix + "keys.provider." + name
	var keks []string
	for i := range 64 {
		keks = append(keks, fmt.Sprintf("k-%d", i))
	}
	// The KEKs do not leave the broker, so each takes two calls.
	policy := harness.Write(t, dir+"/policy.toml", "[[rule]]\nidentities = [\"uid:0\"]\nkeks = [\"k-*\"]\nactions = [\"wrap\", \"unwrap\"]\n"+
		"[[limit]]\nidentities = [\"uid:0\"]\nper-second = 100000\nburst = 100000\n")
	serve := func() *harness.Process {
		t.Helper()
		p := harness.Start(t, dir, "copilot", exec.Command("copilot", "serve", "--dir", dir+"/store", "--policy", policy, "--listen", "unix://"+dir+"/copilot.sock"))
		harness.Await(t, "copilot", harness.Reachable(dir+"/copilot.sock"))
		return p
	}
	b := serve()
	for _, kek := range keks {
		if status, body := harness.RequestOverSocket(t, dir+"/store/admin.sock", "POST", "/api/v2/keks", fmt.Sprintf(`{"id":%q}`, kek)); status != 200 {
			t.Fatalf("%d %s", status, body)
		}
	}
	harness.StartPilot(t, dir, "unix://"+dir+"/copilot.sock", "--provider-name", name, "--admin-listen", "unix://"+dir+"/admin.sock")
	provider, err := ocicryptclient.New(name, keyproviderconfig.KeyProviderAttrs{Grpc: "unix://" + dir + "/keyprovider.sock"}, grpcdial.Call)
	if err != nil {
		t.Fatal(err)
	}
	own := processor.Keys{Providers: map[string]processor.KeyProvider{name: provider}}
	calls := func() (n int) {
		t.Helper()
		_, metrics := harness.RequestOverSocket(t, dir+"/store/admin.sock", "GET", "/metrics", "")
		for _, m := range regexp.MustCompile(`(?m)^copilot_requests_total\{action="(?:export|unwrap)".* (\S+)$`).FindAllStringSubmatch(metrics, -1) {
			f, err := strconv.ParseFloat(m[1], 64)
			if err != nil {
				t.Fatal(err)
			}
			n += int(f)
		}
		return n
	}

	// Wrapped for all of them: each by itself, and all at once.
	layer := processor.NewLayerKey("")
	apart, together := make(map[string]string), make(map[string]string)
	var all [][]byte
	for _, kek := range keks {
		all = append(all, []byte(kek))
		to := processor.Recipients{Keys: own, Parameters: map[string][][]byte{name: {[]byte(kek)}}}
		if apart, err = layer.Wrap(t.Context(), to, apart); err != nil {
			t.Fatal(err)
		}
	}
	if together, err = layer.Wrap(t.Context(), processor.Recipients{Keys: own, Parameters: map[string][][]byte{name: all}}, together); err != nil {
		t.Fatal(err)
	}
	public := base64.StdEncoding.EncodeToString([]byte(`{"cipher":"AES_256_CTR_HMAC_SHA256","hmac":"` + base64.StdEncoding.EncodeToString(make([]byte, 32)) + `","cipheroptions":{}}`))
	unwrap := func(annotations map[string]string) error {
		t.Helper()
		annotations[processor.AnnotationPrefix+"pubopts"] = public
		key, err := processor.Unwrap(t.Context(), own, ocispec.Descriptor{Annotations: annotations})
		if err == nil && !key.Equal(layer) {
			t.Error("another layer's key")
		}
		return err
	}
	// Only the last one may be used.
	b.Stop(t)
	harness.Write(t, policy, strings.Replace(harness.Read(t, policy), "k-*", "k-63", 1))
	serve()
	for what, annotations := range map[string]map[string]string{"each by itself": apart, "all at once": together} {
		before := calls()
		if err := unwrap(annotations); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		t.Logf("%s: %d calls", what, calls()-before)
	}

	// What is not given out costs two calls, and there are 4,096 of that.
	var hostile []string
	for i := range 64 {
		var list []map[string]any
		for j := range 64 {
			list = append(list, map[string]any{"method": "A256GCMKW", "kekId": fmt.Sprintf("x-%d-%d", i, j), "kekVersion": 1, "iv": make([]byte, 12), "wrappedKey": make([]byte, 64)})
		}
		text, err := json.Marshal(list)
		if err != nil {
			t.Fatal(err)
		}
		hostile = append(hostile, base64.StdEncoding.EncodeToString(text))
	}
	before := calls()
	err = unwrap(map[string]string{keys: strings.Join(hostile, ",")})
	if err == nil || !strings.Contains(err.Error(), "the layer names too many KEKs: the broker is asked 128 times for one layer at most") {
		t.Errorf("%v", err)
	}
	if n := calls() - before; n > 128 {
		t.Errorf("the broker was asked %d times", n)
	}
	if len(fmt.Sprint(err)) > 20000 {
		t.Errorf("an error of %d bytes", len(fmt.Sprint(err)))
	}
	// The next layer has a budget of its own, and what was refused just now is known.
	if err := unwrap(apart); err != nil {
		t.Errorf("the next layer: %v", err)
	}

	// One KEK that may not be used, wrapped again and again, is refused once.
	one := strings.Repeat(base64.StdEncoding.EncodeToString([]byte(`{"method":"copilot","kekId":"k-7","kekVersion":1,"wrappedKey":"AAAA"}`))+",", 64)
	before = calls()
	if err := unwrap(map[string]string{keys: strings.TrimSuffix(one, ",")}); err == nil {
		t.Error("unwrapped")
	}
	if n := calls() - before; n > 32 { // one, and one each two seconds
		t.Errorf("the broker was asked %d times about a KEK that it refuses", n)
	}
	harness.Write(t, policy, strings.Replace(harness.Read(t, policy), "k-63", "k-*", 1))
	harness.Await(t, "a change of the policy", func() error {
		return unwrap(map[string]string{keys: strings.Split(apart[keys], ",")[7]})
	})
}
