package daemonset

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/ctrlplane/pilot/internal/certfile"
)

// DaemonSet is the one that a pod belongs to, and the API server to ask about
// it.
type DaemonSet struct {
	Namespace, Name string
	api             string // https://HOST:PORT
	credentials     string // directory of the pod's service account
	client          *http.Client
	uid             string // empty until it is found
}

// serviceAccount is where a pod has the files of its service account.
const serviceAccount = "/var/run/secrets/kubernetes.io/serviceaccount"

// New returns a DaemonSet of the cluster that this process is in a pod
// of.
func New(namespace, name string) (*DaemonSet, error) {
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, errors.New("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set: this is no pod of Kubernetes; use \"pilot node install\" instead")
	}
	return newDaemonSet(namespace, name, "https://"+net.JoinHostPort(host, port), serviceAccount)
}

func newDaemonSet(namespace, name, api, credentials string) (*DaemonSet, error) {
	pool, err := certfile.Pool(filepath.Join(credentials, "ca.crt"))
	if err != nil {
		return nil, fmt.Errorf("CA of the API server: %w", err)
	}
	return &DaemonSet{Namespace: namespace, Name: name, api: api, credentials: credentials, client: &http.Client{
		Timeout:   5 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}},
	}}, nil
}

func (d *DaemonSet) String() string { return d.Namespace + "/" + d.Name }

// Find looks the DaemonSet up, and remembers which it is, unless it has before.
func (d *DaemonSet) Find(ctx context.Context) error {
	if d.uid != "" {
		return nil
	}
	meta, err := d.get(ctx, d.path())
	if err != nil {
		return err
	}
	// Whoever may not ask for it at the end is to have been allowed to.
	if _, err := d.get(ctx, d.namespacePath()); err != nil {
		return err
	}
	d.uid = meta.UID
	return nil
}

func (d *DaemonSet) path() string {
	return "/apis/apps/v1/namespaces/" + url.PathEscape(d.Namespace) + "/daemonsets/" + url.PathEscape(d.Name)
}

func (d *DaemonSet) namespacePath() string {
	return "/api/v1/namespaces/" + url.PathEscape(d.Namespace)
}

// askAgain is how long to wait before an answer that may be a mishap is asked
// for again.
var askAgain = 2 * time.Second

// refusals is how often in a row the API server has to refuse to answer for that
// to count, for most of [decideIn]. Right after it starts, or while its keys or a
// Role are replaced, it refuses for a moment.
const refusals = 6

// Deleted reports whether the DaemonSet is being deleted, which is why its pod
// is, and why it says so. A pod also ends when it is replaced or its node
// reboots.
//
// With a namespace everything in it goes, in any order, the right to ask too.
func (d *DaemonSet) Deleted(ctx context.Context) (deleted bool, why string) {
	if d.uid == "" {
		return false, "the DaemonSet was not found while this pod ran"
	}
	for refused := 1; ; refused++ {
		deleted, err := d.ask(ctx)
		var status *statusError
		switch {
		case err == nil && deleted == "":
			return false, "the DaemonSet is there and is not being deleted"
		case err == nil:
			return true, deleted
		case errors.As(err, &status) && (status.code == http.StatusUnauthorized || status.code == http.StatusForbidden):
			if refused == refusals {
				return true, "this pod may not ask for the DaemonSet any more: its ServiceAccount or Role is deleted"
			}
		default:
			refused = 0
		}
		if !sleep(ctx, askAgain) {
			return false, "the API server does not tell whether the DaemonSet is being deleted: " + err.Error()
		}
	}
}

// ask returns what shows that the DaemonSet is being deleted, or nothing.
func (d *DaemonSet) ask(ctx context.Context) (deleted string, err error) {
	meta, err := d.get(ctx, d.path())
	var status *statusError
	switch {
	case errors.As(err, &status) && status.code == http.StatusNotFound && status.reason == "NotFound":
		return "the DaemonSet is deleted", nil
	case err != nil:
		return "", err
	case meta.UID != d.uid:
		return "", nil // another of its name, whose pod takes over
	case meta.DeletionTimestamp != "":
		return "the DaemonSet is being deleted", nil
	}
	if meta, err = d.get(ctx, d.namespacePath()); err != nil {
		return "", fmt.Errorf("%v", err) // a refusal counts where it concerns the DaemonSet
	}
	if meta.DeletionTimestamp != "" {
		return "the namespace is being deleted", nil
	}
	return "", nil
}

// metadata is what is asked for of an object.
type metadata struct {
	UID               string `json:"uid"`
	DeletionTimestamp string `json:"deletionTimestamp"`
}

// statusError is an answer of the API server's that is none to the question.
type statusError struct {
	code            int
	reason, message string
}

func (e *statusError) Error() string { return fmt.Sprintf("%d %s", e.code, e.message) }

func (d *DaemonSet) get(ctx context.Context, path string) (metadata, error) {
	var answer struct {
		Metadata metadata `json:"metadata"`
		Kind     string   `json:"kind"`
		Reason   string   `json:"reason"`
		Message  string   `json:"message"`
	}
	token, err := os.ReadFile(filepath.Join(d.credentials, "token"))
	if err != nil {
		return metadata{}, err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, d.api+path, nil)
	if err != nil {
		return metadata{}, err
	}
	r.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	r.Header.Set("Accept", "application/json")
	resp, err := d.client.Do(r)
	if err != nil {
		return metadata{}, err
	}
	defer resp.Body.Close()
	err = json.NewDecoder(io.LimitReader(resp.Body, 4<<20)).Decode(&answer)
	switch {
	case resp.StatusCode != http.StatusOK:
		return metadata{}, fmt.Errorf("GET %s: %w", path, &statusError{resp.StatusCode, answer.Reason, answer.Message})
	case err != nil:
		return metadata{}, fmt.Errorf("GET %s: the answer is not JSON: %w", path, err)
	case answer.Metadata.UID == "":
		return metadata{}, fmt.Errorf("GET %s: the answer is no object of Kubernetes", path)
	}
	return answer.Metadata, nil
}
