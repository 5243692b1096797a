package server

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"path/filepath"
	"time"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/server/keyring"
	"github.com/ctrlplane/pilot/internal/exit"
)

// Keys manages KEKs: those of a running broker, or of a store that no broker has open.
// Errors that a broker has decided are a [*StatusError].
type Keys interface {
	// Create creates a KEK with a new random key of 32 bytes, or with key, of 16, 24 or 32
	// bytes, if that is not nil.
	Create(ctx context.Context, id string, key []byte) (keyring.Info, error)
	// List returns all KEKs that the caller may do anything with.
	List(ctx context.Context) ([]keyring.Info, error)
	// Get describes a KEK.
	Get(ctx context.Context, id string) (keyring.Info, error)
	// Rotate gives the KEK a new version to wrap with. Older ones still unwrap.
	Rotate(ctx context.Context, id string) (keyring.Info, error)
	// Disable stops a version from being used, or the whole KEK if version is 0.
	Disable(ctx context.Context, id string, version int) (keyring.Info, error)
	// Enable undoes Disable, and Destroy before its time has come.
	Enable(ctx context.Context, id string, version int) (keyring.Info, error)
	// Destroy stops a version from being used, or all if version is 0, and deletes its key
	// after that time, in whole seconds.
	Destroy(ctx context.Context, id string, version int, after time.Duration) (keyring.Info, error)
	// Revoke takes the KEK from an identity, whatever the policy says.
	Revoke(ctx context.Context, id, identity string) (keyring.Info, error)
	// Reinstate undoes Revoke.
	Reinstate(ctx context.Context, id, identity string) (keyring.Info, error)
	// Approvals returns the requests that the caller may approve.
	Approvals(ctx context.Context) ([]keystore.Approval, error)
	// Approve approves a request of another admin.
	Approve(ctx context.Context, id string) (keystore.Approval, error)
	// Check tries a KEK.
	Check(ctx context.Context, id string) (Check, error)
	// Public returns the public half of a KEK, signed, and valid for that time, in whole
	// seconds: 0 for the default.
	Public(ctx context.Context, id string, valid time.Duration) (PublicKey, error)
	// Created describes the store if it was created since there was none, or returns "".
	Created() string
	// Close ends the connection, or closes the store.
	Close() error
}

// StatusError is the error of a broker that has decided about a request.
type StatusError struct {
	Status int // of HTTP
	Detail string
}

func (e *StatusError) Error() string { return e.Detail }

// Denied reports whether the broker works, and its answer is no: the caller may not, or
// the KEK does not exist.
func (e *StatusError) Denied() bool {
	return e.Status == http.StatusUnauthorized || e.Status == http.StatusForbidden || e.Status == http.StatusNotFound
}

// OpenKeys manages the KEKs of the store that conf names, through the broker that runs
// there if one does, else in the store itself, which it creates if there is none.
func OpenKeys(ctx context.Context, conf Config) (Keys, error) {
	return openKeys(ctx, conf, true)
}

// OpenExistingKeys is [OpenKeys] for a store that has to exist. If it is a file that is
// missing, the error wraps [keystore.ErrNoStore].
func OpenExistingKeys(ctx context.Context, conf Config) (Keys, error) {
	return openKeys(ctx, conf, false)
}

func openKeys(ctx context.Context, conf Config, mayCreate bool) (Keys, error) {
	conn, err := net.DialTimeout("unix", filepath.Join(conf.Dir, adminSocket), time.Second)
	if err == nil {
		conn.Close()
		if err := checkAdminSocket(filepath.Join(conf.Dir, adminSocket)); err != nil {
			return nil, err
		}
		return adminOf(conf.Dir), nil
	}
	if errors.Is(err, fs.ErrPermission) {
		return nil, err
	}
	if err := conf.check(); err != nil {
		return nil, exit.UsageError(err)
	}
	if !mayCreate && conf.Database == "" {
		if err := keystore.Exists(conf.Dir); err != nil {
			return nil, err
		}
	}
	b, err := newBroker(ctx, conf)
	if err != nil {
		return nil, err
	}
	return newLocalKeys(b, conf), nil
}
