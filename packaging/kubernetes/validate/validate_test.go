// Package validate checks the manifests against the schemas of Kubernetes,
// which come with kubectl-validate.
package validate

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"

	"sigs.k8s.io/kubectl-validate/pkg/openapiclient"
	"sigs.k8s.io/kubectl-validate/pkg/validator"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/api/resmap"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/kustomize/kyaml/yaml"
)

// versions are the oldest and the newest of Kubernetes that there are schemas
// of. Newer ones take what these do.
var versions = []string{"1.27", "1.30"}

func build(t *testing.T, dir string) resmap.ResMap {
	t.Helper()
	m, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		t.Fatalf("kustomize build %s: %v", dir, err)
	}
	return m
}

func newValidator(t *testing.T, version string) *validator.Validator {
	t.Helper()
	crds := tool(t, "crds")
	v, err := validator.New(openapiclient.NewComposite(openapiclient.NewHardcodedBuiltins(version), openapiclient.NewLocalCRDFiles(os.DirFS(crds))))
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func check(v *validator.Validator, manifest []byte) error {
	_, object, err := v.Parse(manifest)
	if err != nil {
		return err
	}
	return v.Validate(object)
}

// TestValid validates what kustomize makes of each folder.
func TestValid(t *testing.T) {
	for _, version := range versions {
		v := newValidator(t, version)
		for _, dir := range []string{"namespace", "pilot", "copilot", "admission", "example"} {
			for _, r := range build(t, "../"+dir).Resources() {
				if version == "1.27" && strings.HasPrefix(r.GetKind(), "ValidatingAdmissionPolicy") {
					continue // which has it since 1.30
				}
				if err := check(v, []byte(r.MustYaml())); err != nil {
					t.Errorf("Kubernetes %s: %s: %s: %v", version, dir, r.CurId(), err)
				}
			}
		}
	}
}

// TestInvalid breaks each kind of object, each of which has to be found.
func TestInvalid(t *testing.T) {
	resources := append(build(t, "../example").Resources(), build(t, "../namespace").Resources()...)
	for _, c := range []struct{ kind, old, new string }{
		{"Namespace", "metadata:", "spec: {finalizer: []}\nmetadata:"},
		{"DaemonSet", "hostPID: true", "hostPIDs: true"},
		{"DaemonSet", "hostPID: true", "hostPID: 1"},
		{"DaemonSet", "privileged: true", `privileged: "true"`},
		{"DaemonSet", "periodSeconds: 5", "periodSecond: 5"},
		{"Deployment", "replicas: 2", `replicas: "2"`},
		{"Deployment", "runAsNonRoot: true", "runAsNonroot: true"},
		{"Deployment", "containerPort: 8443", "containerPort: https"},
		{"StatefulSet", "serviceName: copilot-postgres", "servicename: copilot-postgres"},
		{"Role", "verbs:", "verb:"},
		{"RoleBinding", "roleRef:", "roleref:"},
		{"Service", "ports:", "port:"},
		{"NetworkPolicy", "policyTypes:", "policytypes:"},
		{"PodDisruptionBudget", "maxUnavailable: 1", "maxunavailable: 1"},
		{"ConfigMap", "data:", "datas:"},
		{"ServiceAccount", "automountServiceAccountToken: false", "automountServiceAccountToken: 0"},
	} {
		t.Run(c.kind+" "+c.new, func(t *testing.T) {
			found := false
			for _, r := range resources {
				manifest := []byte(r.MustYaml())
				if r.GetKind() != c.kind || !bytes.Contains(manifest, []byte(c.old)) {
					continue
				}
				found = true
				for _, version := range versions {
					if err := check(newValidator(t, version), bytes.Replace(manifest, []byte(c.old), []byte(c.new), 1)); err == nil {
						t.Errorf("Kubernetes %s takes it", version)
					}
				}
			}
			if !found {
				t.Errorf("no %s has %q", c.kind, c.old)
			}
		})
	}
}

// TestReferences checks that what the objects name in each other is there, but
// for the Secrets, which are the user's.
func TestReferences(t *testing.T) {
	resources := build(t, "../example")
	has, apps := map[string]bool{}, map[string]bool{"pilot": true, "copilot": true, "copilot-postgres": true}
	selectors := map[string][]string{
		"Service":             {"spec", "selector"},
		"NetworkPolicy":       {"spec", "podSelector", "matchLabels"},
		"PodDisruptionBudget": {"spec", "selector", "matchLabels"},
		"DaemonSet":           {"spec", "selector", "matchLabels"},
		"Deployment":          {"spec", "selector", "matchLabels"},
		"StatefulSet":         {"spec", "selector", "matchLabels"},
	}
	for _, r := range resources.Resources() {
		has[r.GetKind()+" "+r.GetName()] = true
		namespace := "pilot-system"
		if strings.HasPrefix(r.GetName(), "copilot") {
			namespace = "copilot-system"
		} else if strings.HasPrefix(r.GetKind(), "ValidatingAdmissionPolicy") {
			namespace = ""
		}
		if r.GetNamespace() != namespace {
			t.Errorf("%s is in namespace %q, want %q", r.CurId(), r.GetNamespace(), namespace)
		}
		if r.GetKind() == "Secret" {
			t.Errorf("%s: the manifests hold a Secret", r.CurId())
		}
	}
	for _, r := range resources.Resources() {
		m, err := r.Map()
		if err != nil {
			t.Fatal(err)
		}
		// An empty selector selects all pods, or none.
		if at, ok := selectors[r.GetKind()]; ok {
			name := ""
			if node, err := r.Pipe(yaml.Lookup(append(at, "app.kubernetes.io/name")...)); err == nil {
				name = yaml.GetValue(node)
			}
			if !apps[name] {
				t.Errorf("%s selects no app but %q", r.CurId(), name)
			}
		}
		walk(m, func(key string, value any) {
			switch fields, _ := value.(map[string]any); key {
			case "configMap", "configMapKeyRef":
				if !has[fmt.Sprint("ConfigMap ", fields["name"])] {
					t.Errorf("%s: there is no ConfigMap %v", r.CurId(), fields["name"])
				}
			case "serviceAccountName":
				if !has[fmt.Sprint("ServiceAccount ", value)] {
					t.Errorf("%s: there is no ServiceAccount %v", r.CurId(), value)
				}
			case "image":
				if image := fmt.Sprint(value); !strings.Contains(image, "/") || !strings.Contains(image, ":") {
					t.Errorf("%s: the image %s has no registry or no tag", r.CurId(), image)
				}
			}
		})
	}
}

// walk calls f for each field below v.
func walk(v any, f func(key string, value any)) {
	switch v := v.(type) {
	case map[string]any:
		for key, value := range v {
			f(key, value)
			walk(value, f)
		}
	case []any:
		for _, value := range v {
			walk(value, f)
		}
	}
}
