//go:build kubernetes

package validate

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// tool returns the path of a file in the directory of the tests' tools.
func tool(t *testing.T, name string) string {
	t.Helper()
	tools := os.Getenv("PILOT_TOOLS")
	if tools == "" {
		tools = "../../../.cache/tools"
	}
	name = filepath.Join(tools, name)
	if _, err := os.Stat(name); err != nil {
		t.Fatalf("%s is missing: install it with \"scripts/install-tools.sh %s helm\"", name, tools)
	}
	return name
}

// helm runs Helm, and returns its output or what it says about its failure.
func helm(t *testing.T, args ...string) (string, error) {
	t.Helper()
	home := t.TempDir()
	cmd := exec.Command(tool(t, "bin/helm"), args...)
	cmd.Env = append(os.Environ(), "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home, "KUBECONFIG=/dev/null")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("helm %s: %w: %s", args[0], err, stderr.String())
	}
	return stdout.String(), nil
}

// asExample are the values that make of the chart what the example is.
var asExample = []string{
	"--set=images.registry=registry.example.com", "--set=images.pilot.tag=v1", "--set=images.copilot.tag=v1",
	"--set=copilot.service.clusterIP=10.96.0.200", "--set=copilot.postgres.enabled=true",
	"--set-file=broker.ca=../example/ca.pem",
}

// template renders the chart.
func template(t *testing.T, args ...string) (string, error) {
	t.Helper()
	return helm(t, append([]string{"template", "pilot", "../chart", "--namespace", "pilot-system"}, args...)...)
}

// objects are the objects of manifests, by kind, namespace and name.
func objects(t *testing.T, manifests string) map[string]map[string]any {
	t.Helper()
	all := map[string]map[string]any{}
	for document := range strings.SplitSeq(manifests, "\n---\n") {
		var object map[string]any
		if err := yaml.UnmarshalStrict([]byte(document), &object); err != nil {
			t.Fatalf("%v in\n%s", err, document)
		}
		if object == nil {
			continue
		}
		metadata := object["metadata"].(map[string]any)
		all[fmt.Sprint(object["kind"], " ", metadata["namespace"], "/", metadata["name"])] = object
	}
	return all
}

// helmOnly are lines of the chart that the manifests have not.
var helmOnly = regexp.MustCompile(`(?m)^(# Source: .*|.* # helm only| +(helm\.sh/chart|app\.kubernetes\.io/(instance|version|managed-by)): .*)\n`)

// rendered returns the manifests that are made from the chart, by their files.
func rendered(t *testing.T) map[string]string {
	t.Helper()
	files := map[string]string{}
	for file, from := range map[string]string{
		"pilot/rbac.yaml": "pilot/rbac.yaml", "pilot/daemonset.yaml": "pilot/daemonset.yaml", "admission/policy.yaml": "admission/policy.yaml",
		"copilot/deployment.yaml": "copilot/deployment.yaml", "copilot/service.yaml": "copilot/service.yaml",
		"copilot/networkpolicy.yaml": "copilot/networkpolicy.yaml", "copilot/postgres/postgres.yaml": "copilot/postgres/postgres.yaml",
		"copilot": "copilot/configmaps.yaml",
	} {
		text, err := template(t, append(asExample, "--set=images.postgres=postgres", "--show-only=templates/"+from)...)
		if err != nil {
			t.Fatal(err)
		}
		if file == "copilot" {
			for _, o := range objects(t, text) {
				for name, content := range o["data"].(map[string]any) {
					files[file+"/"+name] = content.(string)
				}
			}
			continue
		}
		text = regexp.MustCompile(`(?m)^\s*\n`).ReplaceAllString(text, "")
		text = helmOnly.ReplaceAllString(strings.TrimPrefix(text, "---\n"), "")
		text = regexp.MustCompile(`image: registry\.example\.com/(\w+):v1`).ReplaceAllString(text, "image: $1")
		files[file] = "# Made from ../chart by \"make manifests\".\n" + text
	}
	return files
}

// TestManifestsAreMadeFromTheChart compares kustomize's manifests with the chart. With
// -update it makes them.
func TestManifestsAreMadeFromTheChart(t *testing.T) {
	for name, want := range rendered(t) {
		name = "../" + name
		if *update {
			if err := os.WriteFile(name, []byte(want), 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		is, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if string(is) != want {
			t.Errorf("%s is not what the chart makes: change the chart, then \"make manifests\":\n%s", name, is)
		}
	}
}

var hash = regexp.MustCompile(`"name":"((?:co)?pilot)-[a-z0-9]{10}"`)

// TestExampleIsWhatTheChartInstalls compares all that both ways install.
func TestExampleIsWhatTheChartInstalls(t *testing.T) {
	text, err := template(t, asExample...)
	if err != nil {
		t.Fatal(err)
	}
	chart := objects(t, helmOnly.ReplaceAllString(text, ""))
	var manifests strings.Builder
	for _, r := range build(t, "../example").Resources() {
		b, err := r.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&manifests, "%s\n---\n", hash.ReplaceAll(b, []byte(`"name":"$1"`)))
	}
	example := objects(t, manifests.String())
	chart["Service copilot-system/copilot"]["spec"].(map[string]any)["clusterIP"] = "10.96.0.200" // which is no line of the manifests
	for name, o := range chart {
		if !reflect.DeepEqual(o, example[name]) {
			t.Errorf("%s differs:\nthe chart has\n%s\nthe example has\n%s", name, asYAML(o), asYAML(example[name]))
		}
	}
	for name := range example {
		if chart[name] == nil {
			t.Errorf("the chart has no %s", name)
		}
	}
}

func asYAML(o map[string]any) string {
	b, _ := yaml.Marshal(o)
	return string(b)
}

// TestPackagedChart makes the package of a release, which names the images of the release
// and is the same each time.
func TestPackagedChart(t *testing.T) {
	var packages []string
	for range 2 {
		dir := t.TempDir()
		cmd := exec.Command("../../../scripts/chart.sh", dir)
		cmd.Env = append(os.Environ(), "VERSION=v1.2.3", "SOURCE_DATE_EPOCH=1700000000")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		content, err := os.ReadFile(dir + "/pilot-chart-1.2.3.tgz")
		if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, string(content))
		text, err := helm(t, append([]string{"template", "pilot", dir + "/pilot-chart-1.2.3.tgz"}, asExample[0], asExample[3], asExample[5], "--set=monitoring.rules.enabled=true")...)
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"image: registry.example.com/pilot:v1.2.3\n", "image: registry.example.com/copilot:v1.2.3\n", "helm.sh/chart: pilot-1.2.3\n", "alert: CopilotCertificateExpires\n"} {
			if !strings.Contains(text, want) {
				t.Errorf("want %q in\n%s", want, text)
			}
		}
	}
	if packages[0] != packages[1] {
		t.Error("the packages differ")
	}
}

// TestDocumentedValues renders the chart with the values that the documentation shows, which
// are those of the example.
func TestDocumentedValues(t *testing.T) {
	page, err := os.ReadFile("../../../docs/kubernetes.md")
	if err != nil {
		t.Fatal(err)
	}
	_, values, _ := strings.Cut(string(page), "```yaml\n")
	values, _, found := strings.Cut(values, "```")
	file := filepath.Join(t.TempDir(), "values.yaml")
	if err := os.WriteFile(file, []byte(values), 0o644); err != nil || !found {
		t.Fatal("the page has no values: ", err)
	}
	got, err := template(t, "--values="+file, asExample[len(asExample)-1])
	if err != nil {
		t.Fatal(err)
	}
	if want, err := template(t, asExample...); err != nil || got != want {
		t.Errorf("they make other manifests than the example's: %v\n%s", err, got)
	}
}

// TestAnotherGroupOfNodes renders the release that the documentation has for another group of
// nodes, which has nothing in common with the first.
func TestAnotherGroupOfNodes(t *testing.T) {
	first, err := template(t, asExample...)
	if err != nil {
		t.Fatal(err)
	}
	text, err := template(t, "--set=images.registry=registry.example.com", "--set=pilot.name=pilot-gpu", "--set=pilot.nodeSelector.group=gpu",
		"--set=copilot.enabled=false", "--set=admissionPolicy.enabled=false", "--set=broker.url=https://10.96.0.200:8443", asExample[len(asExample)-1])
	if err != nil {
		t.Fatal(err)
	}
	all, group := objects(t, first), objects(t, text)
	if _, ok := group["DaemonSet pilot-system/pilot-gpu"]; !ok {
		t.Errorf("there is no DaemonSet of the group: %s", text)
	}
	for id := range group {
		if _, ok := all[id]; ok || strings.HasPrefix(id, "ValidatingAdmissionPolicy") {
			t.Errorf("%s is not the group's alone", id)
		}
	}
}

// everything are values that have all objects and fields rendered but those that others
// exclude.
var everything = []string{
	"--set=pilot.lazy=true", "--set=pilot.workloads=false", "--set=pilot.name=pilot-gpu", "--set=pilot.binDir=/opt/pilot/bin",
	"--set=pilot.extraArgs={--containerd-address=/run/k3s/containerd/containerd.sock}", "--set=pilot.podLabels.a=b", "--set=pilot.podAnnotations.a=b",
	"--set=pilot.serviceAccount.annotations.a=b", "--set-json=pilot.affinity={\"nodeAffinity\":{}}", "--set=images.pullSecrets={registry}",
	"--set=images.copilot.digest=sha256:0000000000000000000000000000000000000000000000000000000000000000",
	"--set=copilot.nodeAddresses=true", "--set=copilot.secrets={vault,hsm}", "--set=copilot.egressPorts={9200}",
	"--set-json=copilot.tolerations=[{\"operator\":\"Exists\"}]", "--set-json=copilot.env=[{\"name\":\"AWS_REGION\",\"value\":\"eu-central-1\"}]",
	"--set-json=copilot.affinity={\"podAntiAffinity\":{}}", "--set=copilot.nodeSelector.a=b", "--set=copilot.priorityClassName=high",
	"--set=copilot.podLabels.a=b", "--set=copilot.podAnnotations.a=b", "--set=copilot.service.annotations.a=b", "--set=copilot.postgres.storageClassName=fast",
	"--set-json=copilot.backends={\"vault\":{\"type\":\"vault-transit\",\"address\":\"https://vault.example.com:8200\",\"kubernetes\":{\"role\":\"copilot\"}}}",
	"--set-json=copilot.keks={\"team-b\":{\"backend\":\"vault\",\"path\":\"team-b\"}}", "--set=copilot.settings.audit-log=-",
}

// TestChartIsValid validates what the chart makes of values by Kubernetes' schemas.
func TestChartIsValid(t *testing.T) {
	for name, values := range map[string][]string{
		"defaults":        nil,
		"everything":      everything,
		"pilot":           {"--set=copilot.enabled=false", "--set=broker.url=https://copilot.example.com:8443"},
		"copilot":         {"--set=pilot.enabled=false", "--set=copilot.postgres.enabled=false", "--set=copilot.masterKey.secret="},
		"IPv6":            {"--set=copilot.service.clusterIP=fd00::200"},
		"other ConfigMap": {"--set=broker.ca=", "--set=broker.caConfigMap.name=trust", "--set=broker.caConfigMap.key=ca.crt"},
		"cert-manager":    {"--set=copilot.tls.source=cert-manager", "--set=copilot.tls.certManager.issuerRef.name=internal"},
		"monitoring":      {"--set=monitoring.podMonitor.enabled=true", "--set=monitoring.rules.enabled=true", "--set=monitoring.rules.labels.release=prometheus"},
		"trust bundle":    {"--set=broker.ca=", "--set=broker.caTrustBundle.name=copilot"},
	} {
		t.Run(name, func(t *testing.T) {
			text, err := template(t, append(asExample, values...)...)
			if err != nil {
				t.Fatal(err)
			}
			v := newValidator(t, "1.30", tool(t, "crds"))
			for id, o := range objects(t, text) {
				if err := check(v, []byte(asYAML(o))); err != nil {
					t.Errorf("%s: %v", id, err)
				}
			}
		})
	}
}

// TestInvalidCustomResources breaks objects of other projects, which has to be found.
func TestInvalidCustomResources(t *testing.T) {
	text, err := template(t, append(asExample, "--set=copilot.tls.source=cert-manager", "--set=copilot.tls.certManager.issuerRef.name=internal",
		"--set=monitoring.podMonitor.enabled=true", "--set=monitoring.rules.enabled=true")...)
	if err != nil {
		t.Fatal(err)
	}
	all, v := objects(t, text), newValidator(t, "1.30", tool(t, "crds"))
	for name, c := range map[string]struct{ old, new string }{
		"Certificate copilot-system/copilot":  {"issuerRef:", "issuerref:"},
		"PodMonitor copilot-system/copilot":   {"podMetricsEndpoints:", "podMetricEndpoints:"},
		"PrometheusRule copilot-system/pilot": {"expr:", "expression:"},
	} {
		manifest := asYAML(all[name])
		if err := check(v, []byte(manifest)); err != nil || !strings.Contains(manifest, c.old) {
			t.Errorf("%s: %v\n%s", name, err, manifest)
		}
		if err := check(v, []byte(strings.Replace(manifest, c.old, c.new, 1))); err == nil {
			t.Errorf("%s with %s is valid", name, c.new)
		}
	}
}

// TestMistypedValuesAreRefused has Helm refuse values that the chart would ignore, or that
// would make something else than was meant.
func TestMistypedValuesAreRefused(t *testing.T) {
	for values, want := range map[string]string{
		"pilot.lasy=true":                              "lasy",
		"pilot.lazy=yes":                               "/pilot/lazy",
		"copilot.replicas=two":                         "/copilot/replicas",
		"copilot.postgress.enabled=true":               "postgress",
		"copilot.tls.source=certmanager":               "/copilot/tls/source",
		"copilot.tls.podCertificate.keyType=RSA":       "/copilot/tls/podCertificate/keyType",
		"copilot.settings.tls-cert=/a":                 "tls-cert",
		"copilot.backends.vault.adress=a":              "/copilot/backends/vault",
		"copilot.keks.team-b.path=a":                   "/copilot/keks/team-b",
		"copilot.service.clusterIP=copilot":            "/copilot/service/clusterIP",
		"broker.url=http://copilot":                    "/broker/url",
		"images.copilot.digest=latest":                 "/images/copilot/digest",
		"images.registry=":                             "images.registry: set",
		"images.registry=https://registry.example.com": "/images/registry",
		"broker.ca=":                                   "broker.ca: set",
		"copilot.service.clusterIP=":                   "copilot.service.clusterIP: set",
		"copilot.enabled=false":                        "broker.url: set",
		"copilot.namespace=pilot-system":               "copilot.namespace: ",
		"copilot.tls.source=cert-manager":              "issuerRef.name: set",
		"copilot.tls.source=pod-certificate":           "signerName: set",
		"monitoring.podMonitors.enabled=true":          "podMonitors",
		"pilot.workloads=true":                         "copilot.policy: pilot.workloads needs rules with workloads",
	} {
		t.Run(values, func(t *testing.T) {
			args := append(asExample, "--set="+values)
			if values == "broker.ca=" {
				args = asExample[:len(asExample)-1] // files go before values
			}
			_, err := template(t, args...)
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want an error with %q", err, want)
			}
		})
	}
}

// TestOldClustersHaveNoAdmissionPolicy renders the chart for Kubernetes 1.29.
func TestOldClustersHaveNoAdmissionPolicy(t *testing.T) {
	old := append(asExample, "--kube-version=1.29.0")
	if text, err := template(t, append(old, "--set=admissionPolicy.enabled=false")...); err != nil || strings.Contains(text, "ValidatingAdmissionPolicy") {
		t.Errorf("%v\n%s", err, text)
	}
}

// TestChartSettings looks at the files that the chart makes of values.
func TestChartSettings(t *testing.T) {
	// In a file, Helm reads all numbers as floats.
	values := filepath.Join(t.TempDir(), "values.yaml")
	if err := os.WriteFile(values, []byte("copilot: {settings: {wrap-limit: 4294967296}}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	text, err := template(t, append(slices.Concat(asExample, everything), "--values="+values)...)
	if err != nil {
		t.Fatal(err)
	}
	data := func(name, file string) string {
		t.Helper()
		return objects(t, text)["ConfigMap copilot-system/"+name]["data"].(map[string]any)[file].(string)
	}
	conf := data("copilot", "copilot.toml")
	for _, want := range []string{"\naudit-log = \"-\"\nwrap-limit = 4294967296\n", "[backends.vault]\n", "type = \"vault-transit\"\n", "[keks.team-b]\n", "\nnodes-url = "} {
		if !strings.Contains(conf, want) {
			t.Errorf("copilot.toml has not %q:\n%s", want, conf)
		}
	}
	for _, want := range []string{"--lazy=true", "--workloads=false", "--daemonset=pilot-gpu", "--bin-dir=/opt/pilot/bin", "--containerd-address=/run/k3s/containerd/containerd.sock"} {
		if !strings.Contains(text, want) {
			t.Errorf("the DaemonSet has no argument %s", want)
		}
	}
	if policy := data("copilot-policy", "policy.toml"); !strings.Contains(policy, `"cluster:system:serviceaccount:pilot-system:pilot-gpu@node/*"`) {
		t.Errorf("the policy is for another account:\n%s", policy)
	}
}
