//go:build !no_awskms

// Package awskms wraps with keys of AWS KMS. The build tag no_awskms leaves it out.
package awskms

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	service "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/smithy-go"

	"github.com/ctrlplane/pilot/copilot/kms"
)

// Types returns the types of backends that this package has.
func Types() kms.Types { return kms.Types{"aws-kms": open} }

// backend wraps with symmetric keys of AWS KMS. The path of a key is its ARN, its
// ID, or an alias (alias/NAME or its ARN). AWS rotates it, and keeps its versions
// to itself. Wrapped is AWS's ciphertext blob.
type backend struct {
	client *service.Client
}

type settings struct {
	Region   string `toml:"region"`   // default: as the SDK finds it (AWS_REGION, the profile)
	Endpoint string `toml:"endpoint"` // default: the region's; a VPC endpoint's URL, say
	Profile  string `toml:"profile"`  // of the shared configuration files; default: AWS_PROFILE, or "default"
}

// maxBlob is how long AWS's ciphertext may be, in bytes.
const maxBlob = 6144

func open(decode kms.Settings) (kms.Backend, error) {
	var s settings
	if err := decode(&s); err != nil {
		return nil, err
	}
	if s.Endpoint != "" {
		if err := kms.CheckURL("endpoint", s.Endpoint); err != nil {
			return nil, err
		}
	}
	// It reads files. Credentials are fetched when they are needed.
	conf, err := config.LoadDefaultConfig(context.Background(), config.WithRegion(s.Region), config.WithSharedConfigProfile(s.Profile))
	if err != nil {
		return nil, err
	}
	if conf.Region == "" {
		return nil, errors.New(`give the region of the keys, as in region = "eu-central-1"`)
	}
	return &backend{service.NewFromConfig(conf, func(o *service.Options) {
		if s.Endpoint != "" {
			o.BaseEndpoint = aws.String(s.Endpoint)
		}
	})}, nil
}

func (b *backend) Wrap(ctx context.Context, path string, plaintext []byte) (int, []byte, error) {
	if err := kms.CheckPlaintext(plaintext); err != nil {
		return 0, nil, err
	}
	out, err := b.client.Encrypt(ctx, &service.EncryptInput{KeyId: &path, Plaintext: plaintext, EncryptionContext: encryptionContext(path)})
	if err != nil {
		return 0, nil, callError(path, err)
	}
	return 1, out.CiphertextBlob, nil
}

// Unwrap names the key. AWS would find it by itself, and so unwrap with
// whichever key the broker may use.
func (b *backend) Unwrap(ctx context.Context, path string, version int, wrapped []byte) ([]byte, error) {
	if err := kms.CheckOnlyVersion(version); err != nil {
		return nil, err
	}
	if len(wrapped) < 1 || len(wrapped) > maxBlob {
		return nil, fmt.Errorf("%w: it has %d bytes", kms.ErrUnwrap, len(wrapped))
	}
	out, err := b.client.Decrypt(ctx, &service.DecryptInput{KeyId: &path, CiphertextBlob: wrapped, EncryptionContext: encryptionContext(path)})
	if err != nil {
		return nil, callError(path, err)
	}
	return out.Plaintext, nil
}

// Unlimited implements [kms.Unlimited]. AWS encrypts with a key that it derives for
// each call from a random nonce of 128 bits:
// https://aws.amazon.com/blogs/security/how-aws-kms-and-aws-encryption-sdk-overcome-symmetric-encryption-bounds/
func (b *backend) Unlimited() {}

func (b *backend) Close() error { return nil }

// encryptionContext is what a wrapped key is bound to besides the AWS key, as two paths
// may be aliases of one. It leaves out account and region, so that a key's
// replica in another region unwraps, too.
func encryptionContext(path string) map[string]string {
	if arn := strings.SplitN(path, ":", 6); len(arn) == 6 {
		path = arn[5]
	} else if !strings.HasPrefix(path, "alias/") {
		path = "key/" + path
	}
	return map[string]string{"copilot-path": path}
}

func callError(path string, err error) error {
	sentinel := kms.ErrUnavailable
	if api, ok := errors.AsType[smithy.APIError](err); ok {
		switch api.ErrorCode() {
		case "NotFoundException":
			sentinel = kms.ErrNotFound
		case "AccessDeniedException", "UnrecognizedClientException", "InvalidSignatureException", "InvalidClientTokenId", "ExpiredTokenException",
			"SignatureDoesNotMatch", "IncompleteSignature", "MissingAuthenticationToken", "DisabledException", "KMSInvalidStateException",
			"InvalidKeyUsageException", "InvalidGrantTokenException":
			sentinel = kms.ErrForbidden
		case "InvalidCiphertextException", "IncorrectKeyException":
			sentinel = kms.ErrUnwrap
		}
	}
	return fmt.Errorf("key %s: %w: %w", path, sentinel, err)
}
