package server

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/policy"
	"github.com/ctrlplane/pilot/copilot/server/auditing"
	"github.com/ctrlplane/pilot/copilot/server/keyring"
	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/publickek"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// PublicKey is the public half of a KEK.
type PublicKey struct {
	ID      string    `json:"id"`
	Version int       `json:"version"`
	Method  string    `json:"method"` // by which layer keys are wrapped with it
	Broker  string    `json:"broker"` // that signed it
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
	// File is the file that those who encrypt get.
	File string `json:"file"`
}

// Bounds of how long the file of a public key is valid.
const (
	publicFor    = 90 * 24 * time.Hour // by default
	maxPublicFor = 10 * 365 * 24 * time.Hour
)

// publicSigner are the files of the certificate that signs public halves of KEKs, and of
// its key. They are read each time, so a renewed one is used at once.
type publicSigner struct{ cert, key string }

var errNoSigner = errors.New("this broker gives out no public keys: run \"copilot certs public-keys\", and set public-keys-cert and public-keys-key")

func (s publicSigner) open() (publickek.Signer, error) {
	if s.cert == "" {
		return publickek.Signer{}, errNoSigner
	}
	pair, err := certfile.KeyPair(s.cert, s.key)
	if err != nil {
		return publickek.Signer{}, fmt.Errorf("public-keys-cert: %w", err)
	}
	signer := publickek.Signer{Key: pair.PrivateKey.(crypto.Signer)} // as [tls.X509KeyPair] has checked
	for _, der := range pair.Certificate {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return publickek.Signer{}, fmt.Errorf("public-keys-cert: %w", err)
		}
		signer.Chain = append(signer.Chain, cert)
	}
	return signer, nil
}

func (a *api) public(r *http.Request, e *auditing.Entry, k keyring.KEK) (any, error) {
	n, err := number(r, "seconds", 0)
	if err != nil {
		return nil, err
	}
	return a.publicKEK(r.Context(), e, k, time.Duration(n)*time.Second)
}

// publicKEK returns the public half of a KEK, valid for that time, or for the default if it
// is 0: that is shorter if the certificate that signs expires before.
func (a *api) publicKEK(ctx context.Context, e *auditing.Entry, k keyring.KEK, valid time.Duration) (PublicKey, error) {
	if valid < 0 || valid > maxPublicFor {
		return PublicKey{}, fmt.Errorf("%w: a public key is valid for ten years at most", keystore.ErrInput)
	}
	signer, err := a.signer.open()
	if err != nil {
		return PublicKey{}, err
	}
	key, err := a.keks.Public(ctx, k)
	if err != nil {
		return PublicKey{}, err
	}
	e.Version = key.Version
	now := time.Now()
	if valid == 0 {
		valid = min(publicFor, signer.Chain[0].NotAfter.Sub(now))
	}
	f, text, err := signer.Sign(key, now, valid)
	if errors.Is(err, publickek.ErrValidity) {
		err = fmt.Errorf("%w: %w", keystore.ErrState, err)
	}
	if err != nil {
		return PublicKey{}, err
	}
	e.Reason = "valid until " + f.Expires.Format(time.RFC3339)
	return PublicKey{key.ID, key.Version, wireformat.MethodHPKE, f.Broker, f.Created, f.Expires, string(text)}, nil
}

func (k *remoteKeys) Public(ctx context.Context, id string, valid time.Duration) (key PublicKey, err error) {
	path := "/" + url.PathEscape(id) + "/public"
	if valid > 0 {
		path += "?seconds=" + strconv.FormatInt(int64(valid/time.Second), 10)
	}
	err = k.call(ctx, http.MethodGet, path, nil, &key)
	return key, err
}

func (l *localKeys) Public(ctx context.Context, id string, valid time.Duration) (PublicKey, error) {
	return onKEK(ctx, l, "public", id, func(ctx context.Context, e *auditing.Entry, k keyring.KEK) (PublicKey, error) {
		return l.api.publicKEK(ctx, e, k, valid)
	}, policy.Public, policy.Admin)
}
