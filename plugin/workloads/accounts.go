package workloads

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"regexp"
	"sync"
	"syscall"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/ctrlplane/pilot/internal/jwks"
)

// Accounts says where to find the service accounts of pods: in the tokens that the kubelet
// projects into them. A pod's author can put any text in such a place, by a projected
// ConfigMap, so a token counts only if the cluster has signed it for this very pod.
type Accounts struct {
	// KubeletDir is the kubelet's directory, such as /var/lib/kubelet.
	KubeletDir string
	// KeysFile has the public keys with which the cluster signs tokens, as a JSON Web Key
	// Set (RFC 7517). If it is "", no service account is known.
	KeysFile string
}

const (
	maxToken    = 32 << 10 // bytes
	maxKeys     = 1 << 20  // bytes
	maxVolumes  = 256      // of a pod
	maxAccounts = 4096     // that are remembered
)

// podUID matches the UIDs of pods: UUIDs, and hashes for static pods.
var podUID = regexp.MustCompile(`^[0-9a-zA-Z][0-9a-zA-Z_-]{0,127}$`)

// serviceAccount matches the names of service accounts: RFC 1123 subdomains.
var serviceAccount = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$`)

// tokenAlgorithms are those with which Kubernetes signs.
var tokenAlgorithms = []jose.SignatureAlgorithm{jose.RS256, jose.ES256, jose.ES384, jose.ES512}

// of returns the name of a pod's service account, or why it is not known. The error says why
// that could not be found out.
func (a Accounts) of(namespace, uid string) (name, unknown string, err error) {
	if a.KeysFile == "" {
		return "", "workload-token-keys is not set in pilot.toml", nil
	}
	b, err := readAtMost(os.DirFS("/"), a.KeysFile[1:], maxKeys)
	if err != nil {
		return "", "", fmt.Errorf("workload-token-keys: %w", err)
	}
	var keys jose.JSONWebKeySet
	if err := json.Unmarshal(jwks.WithoutCertificates(b), &keys); err != nil || len(keys.Keys) == 0 {
		return "", "", fmt.Errorf("workload-token-keys: %s is not a JSON Web Key Set: get it by \"kubectl get --raw /openid/v1/jwks\"", a.KeysFile)
	}
	if !podUID.MatchString(uid) {
		return "", fmt.Sprintf("the pod's UID %.130q is none of Kubernetes'", uid), nil
	}
	dir := path.Join(a.KubeletDir, "pods", uid, "volumes", "kubernetes.io~projected")
	volumes, err := os.OpenRoot(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return "", "the pod has no token of a service account", nil
	}
	if err != nil {
		return "", "", err
	}
	defer volumes.Close()
	names, err := fs.ReadDir(volumes.FS(), ".")
	if err != nil {
		return "", "", err
	}
	unknown = "the pod has no token of a service account"
	for _, e := range names[:min(len(names), maxVolumes)] {
		token, err := readToken(volumes, e.Name())
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			name, err = check(token, keys, namespace, uid)
		}
		if err == nil {
			return name, "", nil
		}
		unknown = fmt.Sprintf("the token in the pod's volume %s does not count: %s", e.Name(), err)
	}
	return "", unknown, nil
}

// readToken reads the token of a volume, which is the kubelet's links deep. The links of a
// volume lead to no other.
func readToken(volumes *os.Root, volume string) ([]byte, error) {
	root, err := volumes.OpenRoot(volume)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	// A named pipe must not block.
	f, err := root.OpenFile("token", os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readFile(f, maxToken)
}

func readAtMost(dir fs.FS, name string, most int64) ([]byte, error) {
	f, err := dir.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readFile(f, most)
}

func readFile(f fs.File, most int64) ([]byte, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > most {
		return nil, fmt.Errorf("%s is not a file of at most %d bytes", info.Name(), most)
	}
	return io.ReadAll(io.LimitReader(f, most))
}

// check returns the service account in a token that one of keys has signed for a pod. An
// expired token counts: a pod keeps its service account as long as it exists.
func check(token []byte, keys jose.JSONWebKeySet, namespace, uid string) (string, error) {
	signed, err := jwt.ParseSigned(string(token), tokenAlgorithms)
	if err != nil {
		return "", errors.New("it is not a signed JSON Web Token")
	}
	var claims struct {
		Subject    string `json:"sub"`
		Kubernetes struct {
			Namespace string `json:"namespace"`
			Pod       struct {
				UID string `json:"uid"`
			} `json:"pod"`
			Account struct {
				Name string `json:"name"`
			} `json:"serviceaccount"`
		} `json:"kubernetes.io"`
	}
	if err := signed.Claims(&keys, &claims); err != nil {
		return "", errors.New("no key in workload-token-keys has signed it")
	}
	name := claims.Kubernetes.Account.Name
	switch {
	case claims.Kubernetes.Pod.UID != uid || claims.Kubernetes.Namespace != namespace:
		return "", errors.New("it is for another pod")
	case !serviceAccount.MatchString(name) || claims.Subject != "system:serviceaccount:"+namespace+":"+name:
		return "", errors.New("it is not for a service account")
	}
	return name, nil
}

// accountCache remembers service accounts by pod. It is safe for concurrent use.
type accountCache struct {
	mu    sync.Mutex
	known map[[2]string]string // by namespace and UID
}

func (c *accountCache) of(a Accounts, namespace, uid string) (name, unknown string, err error) {
	pod := [2]string{namespace, uid}
	c.mu.Lock()
	name, ok := c.known[pod]
	c.mu.Unlock()
	if ok && a.KeysFile != "" {
		return name, "", nil
	}
	name, unknown, err = a.of(namespace, uid)
	if name != "" {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.known == nil || len(c.known) >= maxAccounts {
			c.known = map[[2]string]string{}
		}
		c.known[pod] = name
	}
	return name, unknown, err
}
