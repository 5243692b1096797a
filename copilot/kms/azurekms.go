//go:build !no_azurekms

package kms

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azkeys"
)

func init() { types["azure-key-vault"] = openAzure }

// azureKMS wraps with keys of an Azure Key Vault or a Managed HSM. The path of a
// key is its name there. Azure rotates it. Its versions have no numbers, so 1
// stands for all of them.
//
// Wrapped is the length of the version's name, a byte, that name, and what Azure
// made of a frame: the length of the plaintext, a byte, the plaintext, and zeros
// up to frameSize. A256KW takes only whole blocks of 8 bytes.
type azureKMS struct {
	client    *azkeys.Client
	algorithm azkeys.EncryptionAlgorithm
}

type azureSettings struct {
	VaultURL  string `toml:"vault-url"` // https://NAME.vault.azure.net or https://NAME.managedhsm.azure.net
	Algorithm string `toml:"algorithm"` // RSA-OAEP-256, the default, or A256KW
}

const frameSize = 40 // bytes

var (
	azureName    = regexp.MustCompile(`^[0-9A-Za-z-]{1,127}$`)
	azureVersion = regexp.MustCompile(`^[0-9A-Za-z]{1,64}$`)
)

func openAzure(settings Settings) (Backend, error) {
	var s azureSettings
	if err := settings(&s); err != nil {
		return nil, err
	}
	// It reads the environment. A token is fetched when it is needed.
	credential, err := azidentity.NewDefaultAzureCredential(nil)
	if err != nil {
		return nil, err
	}
	return newAzure(s, credential, nil)
}

// newAzure sends requests with transport, or as the SDK does if it is nil.
func newAzure(s azureSettings, credential azcore.TokenCredential, transport policy.Transporter) (*azureKMS, error) {
	if s.VaultURL == "" {
		return nil, errors.New(`give the URL of the vault as vault-url, as in "https://team.vault.azure.net"`)
	}
	if err := checkURL("vault-url", s.VaultURL); err != nil {
		return nil, err
	}
	b := &azureKMS{algorithm: azkeys.EncryptionAlgorithm(s.Algorithm)}
	switch b.algorithm {
	case "":
		b.algorithm = azkeys.EncryptionAlgorithmRSAOAEP256
	case azkeys.EncryptionAlgorithmRSAOAEP256, azkeys.EncryptionAlgorithmA256KW:
	default:
		return nil, fmt.Errorf("algorithm = %q: it is neither RSA-OAEP-256 nor A256KW", s.Algorithm)
	}
	var err error
	b.client, err = azkeys.NewClient(s.VaultURL, credential, &azkeys.ClientOptions{ClientOptions: azcore.ClientOptions{Transport: transport}})
	return b, err
}

func (b *azureKMS) Wrap(ctx context.Context, path string, plaintext []byte) (int, []byte, error) {
	if err := checkPlaintext(plaintext); err != nil {
		return 0, nil, err
	}
	if err := checkAzureName(path); err != nil {
		return 0, nil, err
	}
	frame := make([]byte, frameSize)
	defer clear(frame)
	frame[0] = byte(len(plaintext))
	copy(frame[1:], plaintext)
	out, err := b.client.WrapKey(ctx, path, "", azkeys.KeyOperationParameters{Algorithm: &b.algorithm, Value: frame}, nil)
	if err != nil {
		return 0, nil, azureError(path, err, ErrUnavailable)
	}
	if out.KID == nil || out.KID.Name() != path || !azureVersion.MatchString(out.KID.Version()) || len(out.Result) == 0 {
		return 0, nil, fmt.Errorf("key %s: %w: it does not say what it wrapped with", path, ErrUnavailable)
	}
	v := out.KID.Version()
	wrapped := append([]byte{byte(len(v))}, v...)
	return 1, append(wrapped, out.Result...), nil
}

// Unlimited implements [Unlimited]. RSA-OAEP and A256KW (RFC 3394) have no nonce.
func (b *azureKMS) Unlimited() {}

// Unwrap asks for the very version: Azure does not look for it.
func (b *azureKMS) Unwrap(ctx context.Context, path string, version int, wrapped []byte) ([]byte, error) {
	if err := checkOnlyVersion(version); err != nil {
		return nil, err
	}
	if err := checkAzureName(path); err != nil {
		return nil, err
	}
	v, value, ok := cutAzureVersion(wrapped)
	if !ok {
		return nil, fmt.Errorf("key %s: %w: it is not what Azure gave", path, ErrUnwrap)
	}
	out, err := b.client.UnwrapKey(ctx, path, v, azkeys.KeyOperationParameters{Algorithm: &b.algorithm, Value: value}, nil)
	if err != nil {
		return nil, azureError(path, err, ErrUnwrap)
	}
	frame := out.Result
	if len(frame) != frameSize || frame[0] < 1 || frame[0] > MaxPlaintext {
		clear(frame)
		return nil, fmt.Errorf("key %s: %w: no key is in it", path, ErrUnwrap)
	}
	return frame[1 : 1+frame[0]], nil
}

func cutAzureVersion(wrapped []byte) (version string, value []byte, ok bool) {
	if len(wrapped) < 1 {
		return "", nil, false
	}
	n := 1 + int(wrapped[0])
	if len(wrapped) <= n || !azureVersion.Match(wrapped[1:n]) {
		return "", nil, false
	}
	return string(wrapped[1:n]), wrapped[n:], true
}

func (b *azureKMS) Close() error { return nil }

func checkAzureName(path string) error {
	if !azureName.MatchString(path) {
		return fmt.Errorf("key %q: %w: keys there have names of letters, digits and dashes", path, ErrNotFound)
	}
	return nil
}

// azureError says what an error means to our caller. Invalid is what it means
// that Azure does not like what is in the request.
func azureError(path string, err, invalid error) error {
	sentinel := ErrUnavailable
	if answer, ok := errors.AsType[*azcore.ResponseError](err); ok {
		switch answer.StatusCode {
		case http.StatusNotFound:
			sentinel = ErrNotFound
		case http.StatusUnauthorized, http.StatusForbidden:
			sentinel = ErrForbidden
		case http.StatusBadRequest:
			sentinel = invalid
		}
		err = errors.New(azureMessage(answer))
	} else if answer, ok := errors.AsType[*azidentity.AuthenticationFailedError](err); ok && answer.RawResponse != nil && answer.RawResponse.StatusCode < 500 {
		sentinel = ErrForbidden
	}
	return fmt.Errorf("key %s: %w: %w", path, sentinel, err)
}

// azureMessage is what an answer says, without the whole of the exchange.
func azureMessage(answer *azcore.ResponseError) string {
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
