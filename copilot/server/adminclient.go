package server

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/server/keyring"
	"github.com/ctrlplane/pilot/internal/keyjson"
)

// remoteKeys manages the KEKs of a running broker.
type remoteKeys struct {
	http http.Client
	base string
}

// adminOf manages the KEKs of the broker that has the store in dir open.
func adminOf(dir string) *remoteKeys {
	socket := filepath.Join(dir, adminSocket)
	return newRemoteKeys("http://copilot", &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		if err := checkAdminSocket(socket); err != nil {
			return nil, err
		}
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}})
}

// checkAdminSocket rejects another user's socket, which would get the keys that are
// imported.
func checkAdminSocket(name string) error {
	info, err := os.Lstat(name)
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s is not a socket: remove it", name)
	}
	if err := keystore.CheckOwner(name, info); err != nil {
		return fmt.Errorf("admin socket: %w, else remove it", err)
	}
	return nil
}

// RemoteKeys manages the KEKs of the broker at a URL, https://HOST:PORT, with the rights
// that its policy gives.
func RemoteKeys(url string, transport http.RoundTripper) Keys { return newRemoteKeys(url, transport) }

func newRemoteKeys(base string, transport http.RoundTripper) *remoteKeys {
	return &remoteKeys{http: http.Client{
		Timeout: 30 * time.Second, Transport: transport,
		// copilot never redirects, and keys go nowhere else.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, base: base}
}

// alive returns an error if the broker does not answer.
func (k *remoteKeys) alive(ctx context.Context) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, k.base+"/healthz", nil)
	if err != nil {
		return err
	}
	answer, err := k.http.Do(r)
	if err != nil {
		return err
	}
	return answer.Body.Close()
}

func (k *remoteKeys) Created() string { return "" }

func (k *remoteKeys) Close() error {
	k.http.CloseIdleConnections()
	return nil
}

func (k *remoteKeys) Create(ctx context.Context, id string, key []byte) (keyring.Info, error) {
	members := []keyjson.Member{keyjson.Value("id", id)}
	if key != nil {
		members = append(members, keyjson.Key("key", key))
	}
	var info keyring.Info
	err := k.call(ctx, http.MethodPost, "", keyjson.Object(members...), &info)
	return info, err
}

func (k *remoteKeys) List(ctx context.Context) (list []keyring.Info, err error) {
	err = k.call(ctx, http.MethodGet, "", nil, &list)
	return list, err
}

func (k *remoteKeys) Get(ctx context.Context, id string) (info keyring.Info, err error) {
	err = k.call(ctx, http.MethodGet, "/"+url.PathEscape(id), nil, &info)
	return info, err
}

func (k *remoteKeys) Rotate(ctx context.Context, id string) (keyring.Info, error) {
	return k.change(ctx, id, "rotate", nil)
}

func (k *remoteKeys) Disable(ctx context.Context, id string, version int) (keyring.Info, error) {
	return k.change(ctx, id, "disable", versionBody{version})
}

func (k *remoteKeys) Enable(ctx context.Context, id string, version int) (keyring.Info, error) {
	return k.change(ctx, id, "enable", versionBody{version})
}

func (k *remoteKeys) Destroy(ctx context.Context, id string, version int, after time.Duration) (keyring.Info, error) {
	s := seconds(after / time.Second)
	return k.change(ctx, id, "destroy", destroyBody{versionBody{version}, &s})
}

func (k *remoteKeys) Revoke(ctx context.Context, id, identity string) (keyring.Info, error) {
	return k.change(ctx, id, "revoke", identityBody{identity})
}

func (k *remoteKeys) Reinstate(ctx context.Context, id, identity string) (keyring.Info, error) {
	return k.change(ctx, id, "reinstate", identityBody{identity})
}

func (k *remoteKeys) Check(ctx context.Context, id string) (c Check, err error) {
	err = k.call(ctx, http.MethodPost, "/"+url.PathEscape(id)+"/check", nil, &c)
	return c, err
}

func (k *remoteKeys) change(ctx context.Context, id, verb string, in any) (info keyring.Info, err error) {
	var body []byte
	if in != nil {
		if body, err = json.Marshal(in); err != nil {
			return keyring.Info{}, err
		}
	}
	err = k.call(ctx, http.MethodPost, "/"+url.PathEscape(id)+"/"+verb, body, &info)
	return info, err
}

// call clears body, which may hold a key.
func (k *remoteKeys) call(ctx context.Context, method, path string, body []byte, out any) error {
	secret := keyjson.NewBody(body)
	defer secret.Clear()
	req, err := http.NewRequestWithContext(ctx, method, k.base+"/api/v2/keks"+path, nil)
	if err != nil {
		return err
	}
	if len(body) > 0 {
		req.Body, req.ContentLength = secret.Reader(), int64(len(body))
		req.GetBody = func() (io.ReadCloser, error) { return secret.Reader(), nil }
	}
	return k.do(req, out)
}

// do sends a request and decodes the answer into out.
func (k *remoteKeys) do(req *http.Request, out any) error {
	return k.receive(req, func(resp *http.Response) error {
		answer, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
		if err != nil {
			return fmt.Errorf("request to copilot: %w", err)
		}
		return json.Unmarshal(answer, out)
	})
}

// receive sends a request and calls take with the answer. One that is no success is a
// [*StatusError].
func (k *remoteKeys) receive(req *http.Request, take func(*http.Response) error) error {
	resp, err := k.http.Do(req)
	if err != nil {
		return fmt.Errorf("request to copilot: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		return take(resp)
	}
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return fmt.Errorf("request to copilot: %w", err)
	}
	var problem struct {
		Detail string `json:"detail"`
	}
	if json.Unmarshal(answer, &problem) != nil || problem.Detail == "" {
		problem.Detail = resp.Status
	}
	return &StatusError{resp.StatusCode, problem.Detail}
}
