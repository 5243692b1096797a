package copilot

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"time"
)

// Keys manages the KEKs of a store.
type Keys interface {
	// Create makes a KEK with a new random key of 32 bytes, or with key, of
	// 16, 24 or 32 bytes, if that is not nil.
	Create(id string, key []byte) (Info, error)
	List() ([]Info, error)
	Get(id string) (Info, error)
	// Rotate gives the KEK a new version to wrap with.
	Rotate(id string) (Info, error)
	// Delete forgets the KEK with all its versions.
	Delete(id string) error
	Close() error
}

// OpenKeys manages the KEKs in dir, through the server that runs there if one
// does, else in the store itself. auditLog says where changes that no server
// makes are written down; empty for audit.log in dir.
func OpenKeys(dir, auditLog string) (Keys, error) {
	socket := filepath.Join(dir, adminSocket)
	conn, err := net.DialTimeout("unix", socket, time.Second)
	if err == nil {
		conn.Close()
		return newAdminClient(socket), nil
	}
	store, err := OpenStore(dir)
	if err != nil {
		return nil, err
	}
	audit, err := OpenAuditLog(Config{Dir: dir, AuditLog: auditLog}.auditLog())
	if err != nil {
		store.Close()
		return nil, err
	}
	return &directKeys{store, audit}, nil
}

// directKeys is the store, with an audit log.
type directKeys struct {
	store *Store
	audit *AuditLog
}

func (k *directKeys) Close() error { return errors.Join(k.store.Close(), k.audit.Close()) }

func (k *directKeys) Create(id string, key []byte) (Info, error) {
	action := "create"
	if key != nil {
		action = "import"
	}
	return k.audited(action, id, func(e *Entry) (Info, error) { return k.store.Create(id, key, k.audit.before(e)) })
}

func (k *directKeys) Rotate(id string) (Info, error) {
	return k.audited("rotate", id, func(e *Entry) (Info, error) { return k.store.Rotate(id, k.audit.before(e)) })
}

func (k *directKeys) Delete(id string) error {
	_, err := k.audited("delete", id, func(e *Entry) (Info, error) { return Info{}, k.store.Delete(id, k.audit.before(e)) })
	return err
}

func (k *directKeys) Get(id string) (Info, error) {
	return k.audited("info", id, func(*Entry) (Info, error) { return k.store.Get(id) })
}

func (k *directKeys) List() (list []Info, err error) {
	_, err = k.audited("list", "", func(*Entry) (Info, error) {
		list, err = k.store.List()
		return Info{}, err
	})
	return list, err
}

func (k *directKeys) audited(action, id string, do func(*Entry) (Info, error)) (Info, error) {
	e := Entry{Action: action, KEK: id, Who: fmt.Sprintf("uid:%d", os.Getuid()), From: "command line", Verdict: verdictAllowed}
	info, err := do(&e)
	if err != nil {
		_, e.Verdict = statusOf(err)
		e.Reason = err.Error()
	} else if e.written {
		return info, nil
	} else {
		e.Version = info.Version
	}
	if auditErr := k.audit.Write(e); auditErr != nil && !errors.Is(err, errNoAudit) {
		err = errors.Join(err, fmt.Errorf("%w: %w", errNoAudit, auditErr))
	}
	return info, err
}

// adminClient asks the server that has the store open.
type adminClient struct{ http http.Client }

func newAdminClient(socket string) *adminClient {
	return &adminClient{http.Client{
		Timeout: 30 * time.Second,
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}},
	}}
}

func (c *adminClient) Close() error {
	c.http.CloseIdleConnections()
	return nil
}

func (c *adminClient) Create(id string, key []byte) (info Info, err error) {
	in := newKEK{ID: id}
	if key != nil {
		in.Key = &key
	}
	return info, c.call(http.MethodPost, "", in, &info)
}

func (c *adminClient) List() (list []Info, err error) {
	return list, c.call(http.MethodGet, "", nil, &list)
}

func (c *adminClient) Get(id string) (info Info, err error) {
	return info, c.call(http.MethodGet, "/"+url.PathEscape(id), nil, &info)
}

func (c *adminClient) Rotate(id string) (info Info, err error) {
	return info, c.call(http.MethodPost, "/"+url.PathEscape(id)+"/rotate", nil, &info)
}

func (c *adminClient) Delete(id string) error {
	return c.call(http.MethodDelete, "/"+url.PathEscape(id), nil, &struct{}{})
}

func (c *adminClient) call(method, path string, in, out any) error {
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return err
		}
		defer clear(body)
	}
	req, err := http.NewRequest(method, "http://copilot/api/v2/keks"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("ask the running copilot: %w", err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
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
	return errors.New(problem.Detail)
}
