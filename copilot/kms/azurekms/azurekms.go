//go:build !no_azurekms

// Package azurekms wraps with keys of Azure Key Vault and Managed HSM. The build tag
// no_azurekms leaves it out.
package azurekms

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"strings"
	"sync/atomic"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azkeys"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/internal/fips"
)

// Types returns the types of backends that this package has.
func Types() kms.Types { return kms.Types{"azure-key-vault": open} }

// backend wraps with keys of an Azure Key Vault or a Managed HSM. The path of a
// key is its name there. Azure rotates it. Its versions have no numbers, so 1
// stands for all of them.
//
// Wrapped is the length of the version's name, a byte, that name, and what Azure
// made of a frame: the length of the plaintext, a byte, the plaintext, and zeros
// up to frameSize. A256KW takes only whole blocks of 8 bytes.
type backend struct {
	client    *azkeys.Client
	algorithm azkeys.EncryptionAlgorithm
}

type settings struct {
	VaultURL  string `toml:"vault-url"` // https://NAME.vault.azure.net or https://NAME.managedhsm.azure.net
	Algorithm string `toml:"algorithm"` // RSA-OAEP-256, the default, or A256KW
}

const frameSize = 40 // bytes

var (
	keyName     = regexp.MustCompile(`^[0-9A-Za-z-]{1,127}$`)
	versionName = regexp.MustCompile(`^[0-9A-Za-z]{1,64}$`)
)

func open(decode kms.Settings) (kms.Backend, error) {
	var s settings
	if err := decode(&s); err != nil {
		return nil, err
	}
	if os.Getenv("AZURE_CLIENT_CERTIFICATE_PATH") != "" || os.Getenv("IDENTITY_SERVER_THUMBPRINT") != "" {
		// Azure's library names certificates by their SHA-1.
		err := fips.Refuse("AZURE_CLIENT_CERTIFICATE_PATH, and the managed identities of Service Fabric, take SHA-1",
			"use a workload identity, another managed identity, or AZURE_CLIENT_SECRET, and unset the variable")
		if err != nil {
			return nil, err
		}
	}
	// It reads the environment. A token is fetched when it is needed.
	credential, err := azidentity.NewDefaultAzureCredential(&azidentity.DefaultAzureCredentialOptions{ClientOptions: clientOptions(nil)})
	if err != nil {
		return nil, err
	}
	return newBackend(s, credential, nil)
}

// newBackend sends requests with transport, or as the SDK does if it is nil.
func newBackend(s settings, credential azcore.TokenCredential, transport policy.Transporter) (*backend, error) {
	if s.VaultURL == "" {
		return nil, errors.New(`give the URL of the vault as vault-url, as in "https://team.vault.azure.net"`)
	}
	if err := kms.CheckURL("vault-url", s.VaultURL); err != nil {
		return nil, err
	}
	b := &backend{algorithm: azkeys.EncryptionAlgorithm(s.Algorithm)}
	switch b.algorithm {
	case "":
		b.algorithm = azkeys.EncryptionAlgorithmRSAOAEP256
	case azkeys.EncryptionAlgorithmRSAOAEP256, azkeys.EncryptionAlgorithmA256KW:
	default:
		return nil, fmt.Errorf("algorithm = %q: it is neither RSA-OAEP-256 nor A256KW", s.Algorithm)
	}
	var err error
	b.client, err = azkeys.NewClient(s.VaultURL, credential, &azkeys.ClientOptions{ClientOptions: clientOptions(transport)})
	return b, err
}

// clientOptions has the SDK try three times within about a second. Its own back-off
// outlasts the deadline of our callers, who would see only a timeout. An answer that
// asks for a longer pause is not retried.
func clientOptions(transport policy.Transporter) azcore.ClientOptions {
	return azcore.ClientOptions{
		Transport:        transport,
		Retry:            policy.RetryOptions{MaxRetries: 2, RetryDelay: 200 * time.Millisecond, MaxRetryDelay: time.Second},
		PerRetryPolicies: []policy.Policy{recordRefusal{}},
	}
}

// recordRefusal stores the last answer that the SDK retries in the [refusal]
// of the request's context: when the context ends before the next one, the SDK
// returns the context's error alone.
type recordRefusal struct{}

func (recordRefusal) Do(req *policy.Request) (*http.Response, error) {
	resp, err := req.Next()
	last, ok := req.Raw().Context().Value(refusalKey{}).(*refusal)
	if ok && err == nil && (resp.StatusCode == http.StatusRequestTimeout || resp.StatusCode >= http.StatusTooManyRequests) {
		if answer, ok := errors.AsType[*azcore.ResponseError](runtime.NewResponseError(resp)); ok {
			last.Store(answer)
		}
	}
	return resp, err
}

type (
	refusal    = atomic.Pointer[azcore.ResponseError]
	refusalKey struct{}
)

func withRefusal(ctx context.Context) (context.Context, *refusal) {
	last := new(refusal)
	return context.WithValue(ctx, refusalKey{}, last), last
}

func (b *backend) Wrap(ctx context.Context, path string, plaintext []byte) (int, []byte, error) {
	if err := kms.CheckPlaintext(plaintext); err != nil {
		return 0, nil, err
	}
	if err := checkName(path); err != nil {
		return 0, nil, err
	}
	frame := make([]byte, frameSize)
	defer clear(frame)
	frame[0] = byte(len(plaintext))
	copy(frame[1:], plaintext)
	ctx, last := withRefusal(ctx)
	out, err := b.client.WrapKey(ctx, path, "", azkeys.KeyOperationParameters{Algorithm: &b.algorithm, Value: frame}, nil)
	if err != nil {
		return 0, nil, callError(path, err, last.Load(), kms.ErrUnavailable)
	}
	if out.KID == nil || out.KID.Name() != path || !versionName.MatchString(out.KID.Version()) || len(out.Result) == 0 {
		return 0, nil, fmt.Errorf("key %s: %w: it does not say what it wrapped with", path, kms.ErrUnavailable)
	}
	v := out.KID.Version()
	wrapped := append([]byte{byte(len(v))}, v...)
	return 1, append(wrapped, out.Result...), nil
}

// Unlimited implements [kms.Unlimited]. RSA-OAEP and A256KW (RFC 3394) have no nonce.
func (b *backend) Unlimited() {}

// Unwrap names the version: Azure does not look for it.
func (b *backend) Unwrap(ctx context.Context, path string, version int, wrapped []byte) ([]byte, error) {
	if err := kms.CheckOnlyVersion(version); err != nil {
		return nil, err
	}
	if err := checkName(path); err != nil {
		return nil, err
	}
	v, value, ok := cutVersion(wrapped)
	if !ok {
		return nil, fmt.Errorf("key %s: %w: it is not what Azure gave", path, kms.ErrUnwrap)
	}
	ctx, last := withRefusal(ctx)
	out, err := b.client.UnwrapKey(ctx, path, v, azkeys.KeyOperationParameters{Algorithm: &b.algorithm, Value: value}, nil)
	if err != nil {
		return nil, callError(path, err, last.Load(), kms.ErrUnwrap)
	}
	frame := out.Result
	if len(frame) != frameSize || frame[0] < 1 || frame[0] > kms.MaxPlaintext {
		clear(frame)
		return nil, fmt.Errorf("key %s: %w: no key is in it", path, kms.ErrUnwrap)
	}
	return frame[1 : 1+frame[0]], nil
}

func cutVersion(wrapped []byte) (version string, value []byte, ok bool) {
	if len(wrapped) < 1 {
		return "", nil, false
	}
	n := 1 + int(wrapped[0])
	if len(wrapped) <= n || !versionName.Match(wrapped[1:n]) {
		return "", nil, false
	}
	return string(wrapped[1:n]), wrapped[n:], true
}

func (b *backend) Close() error { return nil }

func checkName(path string) error {
	if !keyName.MatchString(path) {
		return fmt.Errorf("key %q: %w: keys there have names of letters, digits and dashes", path, kms.ErrNotFound)
	}
	return nil
}

// callError says what an error means to our caller. Last is what recordRefusal stored,
// or nil. invalid is the error for a request whose content Azure rejects.
func callError(path string, err error, last *azcore.ResponseError, invalid error) error {
	sentinel := kms.ErrUnavailable
	if answer, ok := errors.AsType[*azcore.ResponseError](err); ok {
		switch answer.StatusCode {
		case http.StatusNotFound:
			sentinel = kms.ErrNotFound
		case http.StatusUnauthorized, http.StatusForbidden:
			sentinel = kms.ErrForbidden
		case http.StatusBadRequest:
			sentinel = invalid
		}
		err = errors.New(message(answer))
	} else if answer, ok := errors.AsType[*azidentity.AuthenticationFailedError](err); ok && answer.RawResponse != nil && answer.RawResponse.StatusCode < 500 {
		sentinel = kms.ErrForbidden
	} else if last != nil && (errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)) {
		err = fmt.Errorf("%w, and the last answer was %s", err, message(last))
	}
	return fmt.Errorf("key %s: %w: %w", path, sentinel, err)
}

// message returns an answer's error message, without the rest of the exchange.
func message(answer *azcore.ResponseError) string {
	var said struct {
		Error struct {
			Message    string
			InnerError struct{ Code string }
		}
	}
	if body, err := runtime.Payload(answer.RawResponse); err == nil {
		json.Unmarshal(body, &said) // or what it says is left out
	}
	words := []string{fmt.Sprint(answer.StatusCode)}
	for _, w := range []string{answer.ErrorCode, said.Error.InnerError.Code, said.Error.Message} {
		if w != "" {
			words = append(words, w)
		}
	}
	return strings.Join(words, ": ")
}
