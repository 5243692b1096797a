package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/keyjson"
)

// Keys manages KEKs: those of a server, or of a store that no server has open.
type Keys struct {
	http  http.Client
	base  string
	close func() error
	made  string
}

// Made says which store was made since there was none, or is empty.
func (k *Keys) Made() string { return k.made }

// store describes a store that was made, or returns "" if it was there.
func store(conf Config, s *keystore.Store) string {
	switch {
	case !s.Made():
		return ""
	case conf.Database != "":
		return "made a new store in the database, and its master key is in " + conf.Dir
	}
	return "made a new store in " + conf.Dir + ", with its master key: keep a backup of both, apart"
}

// OpenKeys manages the KEKs of the store that conf names, through the server
// that runs there if one does, else in the store itself, which it makes if there
// is none.
func OpenKeys(ctx context.Context, conf Config) (*Keys, error) {
	return openKeys(ctx, conf, true)
}

// OpenExistingKeys is OpenKeys for a store that has to be there. If it is a file
// that is missing, the error wraps [keystore.ErrNoStore].
func OpenExistingKeys(ctx context.Context, conf Config) (*Keys, error) {
	return openKeys(ctx, conf, false)
}

func openKeys(ctx context.Context, conf Config, mayMake bool) (*Keys, error) {
	conn, err := net.DialTimeout("unix", filepath.Join(conf.Dir, adminSocket), time.Second)
	if err == nil {
		conn.Close()
		return adminOf(conf.Dir), checkAdminSocket(filepath.Join(conf.Dir, adminSocket))
	}
	if errors.Is(err, fs.ErrPermission) {
		return nil, err
	}
	if err := conf.check(); err != nil {
		return nil, exit.UsageError(err)
	}
	if !mayMake && conf.Database == "" {
		if err := keystore.Exists(conf.Dir); err != nil {
			return nil, err
		}
	}
	b, err := newBroker(ctx, conf)
	if err != nil {
		return nil, err
	}
	k := newKeys("http://copilot", here{newAdminAPI(b)})
	k.close, k.made = b.close, store(conf, b.keks.store)
	return k, nil
}

// adminOf manages the KEKs of the server that has the store in dir open.
func adminOf(dir string) *Keys {
	socket := filepath.Join(dir, adminSocket)
	return newKeys("http://copilot", &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		if err := checkAdminSocket(socket); err != nil {
			return nil, err
		}
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}})
}

// checkAdminSocket refuses a socket of somebody else, who would get the keys that are
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

// RemoteKeys manages the KEKs of the server at a URL, https://HOST:PORT, by the
// rights that its policy gives.
func RemoteKeys(url string, transport http.RoundTripper) *Keys { return newKeys(url, transport) }

func newKeys(base string, transport http.RoundTripper) *Keys {
	k := &Keys{http: http.Client{
		Timeout: 30 * time.Second, Transport: transport,
		// copilot answers itself: a key goes nowhere else.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, base: base}
	k.close = func() error {
		k.http.CloseIdleConnections()
		return nil
	}
	return k
}

// here answers requests in this process, for the user that it runs as.
type here struct{ http.Handler }

func (h here) RoundTrip(r *http.Request) (*http.Response, error) {
	me := &unix.Ucred{Pid: int32(os.Getpid()), Uid: uint32(os.Getuid()), Gid: uint32(os.Getgid())}
	r = r.Clone(context.WithValue(r.Context(), peerKey{}, me))
	r.RemoteAddr = "command line"
	if r.Body == nil {
		r.Body = http.NoBody
	}
	w := &answer{header: make(http.Header), status: http.StatusOK}
	h.ServeHTTP(w, r)
	return &http.Response{
		StatusCode: w.status, Status: http.StatusText(w.status), Header: w.header,
		Body: io.NopCloser(&w.body), ContentLength: int64(w.body.Len()), Request: r,
	}, nil
}

// answer is a response that is kept.
type answer struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (a *answer) Header() http.Header         { return a.header }
func (a *answer) WriteHeader(status int)      { a.status = status }
func (a *answer) Write(b []byte) (int, error) { return a.body.Write(b) }

// alive reports why the server does not answer.
func (k *Keys) alive(ctx context.Context) error {
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

// Close ends the connection, or closes the store.
func (k *Keys) Close() error { return k.close() }

// Create makes a KEK with a new random key of 32 bytes, or with key, of 16, 24
// or 32 bytes, if that is not nil.
func (k *Keys) Create(id string, key []byte) (Info, error) {
	members := []keyjson.Member{keyjson.Value("id", id)}
	if key != nil {
		members = append(members, keyjson.Key("key", key))
	}
	var info Info
	err := k.call(http.MethodPost, "", keyjson.Object(members...), &info)
	return info, err
}

// List returns all KEKs that the caller may do anything with.
func (k *Keys) List() (list []Info, err error) {
	err = k.call(http.MethodGet, "", nil, &list)
	return list, err
}

// Get describes a KEK.
func (k *Keys) Get(id string) (info Info, err error) {
	err = k.call(http.MethodGet, "/"+url.PathEscape(id), nil, &info)
	return info, err
}

// Rotate gives the KEK a new version to wrap with. What was wrapped with older
// ones still unwraps.
func (k *Keys) Rotate(id string) (Info, error) { return k.change(id, "rotate", nil) }

// Disable stops a version from being used, or the whole KEK if version is 0.
func (k *Keys) Disable(id string, version int) (Info, error) {
	return k.change(id, "disable", versionBody{version})
}

// Enable undoes Disable, and Destroy before its time has come.
func (k *Keys) Enable(id string, version int) (Info, error) {
	return k.change(id, "enable", versionBody{version})
}

// Destroy stops a version from being used, or all if version is 0, and forgets
// its key after that time, in whole seconds.
func (k *Keys) Destroy(id string, version int, after time.Duration) (Info, error) {
	s := seconds(after / time.Second)
	return k.change(id, "destroy", destroyBody{versionBody{version}, &s})
}

// Revoke takes the KEK from an identity, whatever the policy says.
func (k *Keys) Revoke(id, identity string) (Info, error) {
	return k.change(id, "revoke", identityBody{identity})
}

// Reinstate undoes Revoke.
func (k *Keys) Reinstate(id, identity string) (Info, error) {
	return k.change(id, "reinstate", identityBody{identity})
}

func (k *Keys) change(id, verb string, in any) (info Info, err error) {
	var body []byte
	if in != nil {
		if body, err = json.Marshal(in); err != nil {
			return Info{}, err
		}
	}
	err = k.call(http.MethodPost, "/"+url.PathEscape(id)+"/"+verb, body, &info)
	return info, err
}

// call clears body, which may hold a key.
func (k *Keys) call(method, path string, body []byte, out any) error {
	secret := keyjson.NewBody(body)
	defer secret.Clear()
	req, err := http.NewRequest(method, k.base+"/api/v2/keks"+path, nil)
	if err != nil {
		return err
	}
	if len(body) > 0 {
		req.Body, req.ContentLength = secret.Reader(), int64(len(body))
		req.GetBody = func() (io.ReadCloser, error) { return secret.Reader(), nil }
	}
	resp, err := k.http.Do(req)
	if err != nil {
		return fmt.Errorf("ask the running copilot: %w", err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err != nil {
		return fmt.Errorf("ask the running copilot: %w", err)
	}
	if resp.StatusCode == http.StatusOK {
		return json.Unmarshal(answer, out)
	}
	var problem struct {
		Detail string `json:"detail"`
	}
	if json.Unmarshal(answer, &problem) != nil || problem.Detail == "" {
		problem.Detail = resp.Status
	}
	return &StatusError{resp.StatusCode, problem.Detail}
}

// StatusError is what a broker says is wrong.
type StatusError struct {
	Status int // of HTTP
	Detail string
}

func (e *StatusError) Error() string { return e.Detail }

// Denied reports whether the broker works, and the answer is no: the caller may not,
// or the KEK is not there.
func (e *StatusError) Denied() bool {
	return e.Status == http.StatusUnauthorized || e.Status == http.StatusForbidden || e.Status == http.StatusNotFound
}
