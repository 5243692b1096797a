//go:build kubernetes

package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
)

// helm returns a Helm command of the cluster's admin.
func (k *kubernetes) helm(args ...string) *exec.Cmd {
	k.t.Helper()
	cmd := harness.Command(k.t, filepath.Join(harness.Tools, "bin/helm"), append(args, "--kubeconfig", k.dir+"/admin.conf", "--namespace", "pilot-system")...)
	cmd.Env = append(os.Environ(), "HELM_CACHE_HOME="+k.dir+"/helm", "HELM_CONFIG_HOME="+k.dir+"/helm", "HELM_DATA_HOME="+k.dir+"/helm")
	return cmd
}

// TestKubernetesHelm installs the chart from a registry, upgrades the release, rolls it
// back, gives copilot pod certificates of Kubernetes, and uninstalls the release.
func TestKubernetesHelm(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat(filepath.Join(harness.Tools, "bin/helm")); err != nil {
		t.Fatalf("Helm is missing: install it with \"scripts/install-tools.sh %s\"", harness.Tools)
	}
	ownNetwork(t)
	i := newInstallation(t)
	k := i.kubernetes
	chart := strings.TrimSpace(harness.Output(t, harness.Command(t, filepath.Join(harness.Repo, "scripts/chart.sh"), i.dir+"/chart")))
	harness.Output(t, k.helm("push", chart, "oci://"+i.ci.Registry+"/charts", "--plain-http"))
	version := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(chart), "pilot-chart-"), ".tgz")

	harness.Output(t, k.kubectl("apply", "--kustomize", filepath.Join(harness.Repo, "packaging/kubernetes/namespace")))
	i.secrets("copilot-system", "server-ca.pem", "server-ca-key.pem")
	harness.Write(t, i.dir+"/values.yaml", fmt.Sprintf(`images:
  registry: %[1]s
  pilot: {tag: test}
  copilot: {tag: test}
  postgres: %[1]s/postgres:test
copilot:
  service: {clusterIP: %[2]s}
  postgres: {enabled: true}
`, i.ci.Registry, brokerAddress))
	release := func(do string, args ...string) string {
		t.Helper()
		return harness.Output(t, k.helm(append([]string{do, "pilot", "oci://" + i.ci.Registry + "/charts/pilot", "--plain-http", "--version", version, "--values", i.dir + "/values.yaml",
			"--set-file", "broker.ca=" + i.dir + "/certificates/server-ca.pem", "--set-file", "copilot.policy=" + harness.Write(t, i.dir+"/policy.toml", i.policy)}, args...)...))
	}
	notes := release("install")
	for _, want := range []string{"rollout status daemonset/pilot", "copilot-master-key, copilot-database, copilot-postgres, copilot-tls"} {
		if !strings.Contains(notes, want) {
			t.Errorf("want %q in the notes:\n%s", want, notes)
		}
	}
	k.rolledOut("statefulset/copilot-postgres")
	k.nameServices()
	k.rolledOut("deployment/copilot")
	k.rolledOut("daemonset/pilot")
	i.createKEK("copilot-system")
	i.ran("installed", i.image(0))
	served := func() *x509.Certificate {
		t.Helper()
		conn, err := tls.Dial("tcp", brokerAddress+":8443", &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates[0]
	}
	if cert := served(); cert.NotAfter.Sub(cert.NotBefore) > 8*24*time.Hour {
		t.Errorf("copilot's own certificate is valid until %s", cert.NotAfter)
	}

	// The release is upgraded, and rolled back.
	was := harness.Output(t, k.node.Run("pilot", "--version"))
	pushLayout(i.ci, "pilot-next", nextPilot(t, i.dir))
	release("upgrade", "--set", "images.pilot.repository=pilot-next", "--set", "copilot.replicas=1", "--set", "copilot.settings.wrap-limit=1000000")
	k.rolledOut("daemonset/pilot")
	k.rolledOut("deployment/copilot")
	if is := harness.Output(t, k.node.Run("pilot", "--version")); !strings.Contains(is, "next") {
		t.Errorf("the node has pilot %s, had %s", is, was)
	}
	i.ran("upgraded", i.image(1))
	harness.Output(t, k.helm("rollback", "pilot", "1"))
	k.rolledOut("daemonset/pilot")
	k.rolledOut("deployment/copilot")
	if is := harness.Output(t, k.node.Run("pilot", "--version")); is != was {
		t.Errorf("the node has pilot %s, had %s before the upgrade", is, was)
	}
	i.ran("rolled-back", i.image(2))
	// What can't be changed is refused, and the release stays as it is.
	harness.ExpectFailure(t, k.helm("upgrade", "pilot", "oci://"+i.ci.Registry+"/charts/pilot", "--plain-http", "--version", version, "--reuse-values", "--set", "copilot.service.clusterIP=10.96.0.201"), "may not change once set")

	// The kubelet requests certificates from a signer, which nodes trust by a bundle.
	s := newSigner(t, k)
	last, late := i.image(0), i.image(2) // the machine that encrypts trusts the server CA
	release("upgrade", "--set", "copilot.tls.source=pod-certificate", "--set", "copilot.tls.podCertificate.signerName="+signerName,
		"--set", "broker.caTrustBundle.name="+s.bundle)
	harness.Await(t, "copilot's pods with certificates of the signer", func() error {
		if err := s.sign(); err != nil {
			return err
		}
		status := harness.CombinedOutput(t, k.kubectl("--namespace", "copilot-system", "rollout", "status", "deployment/copilot", "--watch=false"))
		if !strings.Contains(status, "successfully rolled out") {
			return errors.New(status)
		}
		return nil
	})
	k.rolledOut("daemonset/pilot")
	k.rolledOut("deployment/copilot")
	if cert := served(); cert.Issuer.CommonName != signerName {
		t.Errorf("copilot shows a certificate of %s", cert.Issuer)
	}
	i.ran("pod-certificate", last)

	i.removed(late, func() { harness.Output(t, k.helm("uninstall", "pilot")) })
	// The KEKs stay.
	harness.Output(t, k.kubectl("--namespace", "copilot-system", "get", "secret/copilot-master-key", "persistentvolumeclaim/data-copilot-postgres-0"))
	if out := harness.Output(t, k.kubectl("--namespace", "copilot-system", "get", "deployments,services", "--output", "name")); out != "" {
		t.Errorf("left in copilot-system: %s", out)
	}
}

const signerName = "example.com/copilot"

// signer signs the requests for pod certificates of copilot's pods, as an organization's
// own would.
type signer struct {
	k      *kubernetes
	cert   *x509.Certificate
	key    *ecdsa.PrivateKey
	pem    []byte
	bundle string
}

// newSigner makes a signer, and publishes its CA as a ClusterTrustBundle.
func newSigner(t testing.TB, k *kubernetes) *signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: signerName}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	s := &signer{k: k, key: key, pem: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), bundle: "example.com:copilot:ca"}
	if s.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	bundle, err := json.Marshal(harness.Object{"apiVersion": "certificates.k8s.io/v1", "kind": "ClusterTrustBundle", "metadata": harness.Object{"name": s.bundle},
		"spec": harness.Object{"signerName": signerName, "trustBundle": string(s.pem)}})
	if err != nil {
		t.Fatal(err)
	}
	k.apply(string(bundle))
	return s
}

// sign signs the requests that are open.
func (s *signer) sign() error {
	kubectl := func(args ...string) ([]byte, error) {
		out, err := exec.Command(filepath.Join(harness.Tools, "bin/kubernetes"), append([]string{"kubectl", "--kubeconfig", s.k.dir + "/admin.conf", "--cache-dir", s.k.dir + "/cache"}, args...)...).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		return out, err
	}
	out, err := kubectl("get", "podcertificaterequests", "--all-namespaces", "--output", "json")
	if err != nil {
		return err
	}
	var list struct {
		Items []struct {
			Metadata struct{ Namespace, Name string }
			Spec     struct {
				SignerName, ServiceAccountName string
				StubPKCS10Request              []byte
			}
			Status struct{ CertificateChain string }
		}
	}
	if err := json.Unmarshal(out, &list); err != nil {
		return err
	}
	for _, r := range list.Items {
		if r.Spec.SignerName != signerName || r.Status.CertificateChain != "" || r.Metadata.Namespace != "copilot-system" || r.Spec.ServiceAccountName != "copilot" {
			continue
		}
		request, err := x509.ParseCertificateRequest(r.Spec.StubPKCS10Request)
		if err != nil {
			return err
		}
		now := time.Now().Truncate(time.Second)
		template := &x509.Certificate{SerialNumber: big.NewInt(now.UnixNano()), NotBefore: now, NotAfter: now.Add(2 * time.Hour), IPAddresses: []net.IP{net.ParseIP(brokerAddress)},
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
		der, err := x509.CreateCertificate(rand.Reader, template, s.cert, request.PublicKey, s.key)
		if err != nil {
			return err
		}
		status, err := json.Marshal(harness.Object{"status": harness.Object{
			"certificateChain": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
			"notBefore":        now.UTC(), "notAfter": now.Add(2 * time.Hour).UTC(), "beginRefreshAt": now.Add(time.Hour).UTC(),
			"conditions": []harness.Object{{"type": "Issued", "status": "True", "reason": "Signed", "message": "", "lastTransitionTime": now.UTC()}},
		}})
		if err != nil {
			return err
		}
		if _, err := kubectl("--namespace", r.Metadata.Namespace, "patch", "podcertificaterequest", r.Metadata.Name, "--subresource", "status", "--type", "merge", "--patch", string(status)); err != nil {
			return err
		}
	}
	return nil
}
