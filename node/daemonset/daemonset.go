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

// DaemonSet is the DaemonSet of this pod, with a client of its API server.
type DaemonSet struct {
	Namespace, Name string
	api             string // https://HOST:PORT
	credentials     string // directory of the pod's service account
	client          *http.Client
	uid             string // empty until it is found
}

// serviceAccount is the directory of a pod's service account files.
const serviceAccount = "/var/run/secrets/kubernetes.io/serviceaccount"

// New returns a DaemonSet of the cluster that this process runs in, as a pod.
func New(namespace, name string) (*DaemonSet, error) {
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, errors.New("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set: this is not a Kubernetes pod; use \"pilot node install\" instead")
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

// Find looks the DaemonSet up and stores its UID, unless it is stored already.
func (d *DaemonSet) Find(ctx context.Context) error {
	if d.uid != "" {
		return nil
	}
	meta, err := d.get(ctx, d.path())
	if err != nil {
		return err
	}
	// Deleted takes missing permissions for a deletion, so they must exist now.
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

// retryInterval is how long to wait before repeating a request that has failed.
var retryInterval = 2 * time.Second

// refusals is how many requests in a row the API server must deny before that is taken
// for a deletion, which takes most of [decideTimeout]. It denies requests for a moment
// right after it starts, and while its keys or a Role are replaced.
const refusals = 6

// Deleted reports whether the DaemonSet is being deleted, and how that was decided. Its
// pod also ends when it is replaced or its node reboots.
//
// When a namespace is deleted, so is everything in it, in any order, including this pod's
// permissions.
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
				return true, "this pod may no longer read the DaemonSet: its ServiceAccount or Role is deleted"
			}
		default:
			refused = 0
		}
		if !sleep(ctx, retryInterval) {
			return false, "the API server does not say whether the DaemonSet is being deleted: " + err.Error()
		}
	}
}

// ask returns the reason to take the DaemonSet for deleted, or "".
func (d *DaemonSet) ask(ctx context.Context) (deleted string, err error) {
	meta, err := d.get(ctx, d.path())
	var status *statusError
	switch {
	case errors.As(err, &status) && status.code == http.StatusNotFound && status.reason == "NotFound":
		return "the DaemonSet is deleted", nil
	case err != nil:
		return "", err
	case meta.UID != d.uid:
		return "", nil // a new one with its name, whose pod takes over
	case meta.DeletionTimestamp != "":
		return "the DaemonSet is being deleted", nil
	}
	if meta, err = d.get(ctx, d.namespacePath()); err != nil {
		return "", fmt.Errorf("%v", err) // only a denial for the DaemonSet counts
	}
	if meta.DeletionTimestamp != "" {
		return "the namespace is being deleted", nil
	}
	return "", nil
}

// metadata is the part of an object's metadata that is used here.
type metadata struct {
	UID               string `json:"uid"`
	DeletionTimestamp string `json:"deletionTimestamp"`
}

// statusError is an error response of the API server.
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
		return metadata{}, fmt.Errorf("GET %s: the response is not JSON: %w", path, err)
	case answer.Metadata.UID == "":
		return metadata{}, fmt.Errorf("GET %s: the response is not a Kubernetes object", path)
	}
	return answer.Metadata, nil
}
