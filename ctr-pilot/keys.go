package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/imgcrypt/v2/images/encryption/parsehelpers"
	"github.com/containers/ocicrypt/config"
	keyproviderconfig "github.com/containers/ocicrypt/config/keyprovider-config"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/regular"
	"github.com/ctrlplane/pilot/processor"
)

// defaultKeyProviders names the key providers when no variable does.
const defaultKeyProviders = "/etc/pilot/ocicrypt.conf"

// registerKeyProviders makes the key providers of the default file known if no
// variable names another. What is wrong with either file is part of the error of
// whoever needs a key provider.
var registerKeyProviders = sync.OnceFunc(func() {
	if os.Getenv(keyproviderconfig.ENVVARNAME) == "" {
		processor.RegisterKeyProviders(defaultKeyProviders)
	}
})

// keyFlags are imgcrypt's flags for whatever decrypts.
func keyFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringSliceFlag{
			Name:  "key",
			Usage: "`KEY` to decrypt with: a file, FILE:PASSWORD, FILE:pass=PASSWORD, FILE:file=FILE or FILE:fd=NUMBER, or provider:NAME:PARAMETER",
		},
		&cli.StringSliceFlag{
			Name:  "dec-recipient",
			Usage: "recipient to decrypt as, `pkcs7:FILE` with its certificate",
		},
		&cli.StringFlag{
			Name:  "gpg-homedir",
			Usage: "gpg's `DIRECTORY` (default: ~/.gnupg)",
		},
		&cli.StringFlag{
			Name:  "gpg-version",
			Usage: "`VERSION` of gpg, v1 or v2 (default: what is installed)",
		},
		&cli.BoolFlag{
			Name:  "skip-decrypt-auth",
			Usage: "do not check that the keys given here decrypt the image, as when the node has them",
		},
	}
}

func keyArguments(cmd *cli.Command) parsehelpers.EncArgs {
	return parsehelpers.EncArgs{
		GPGHomedir:   cmd.String("gpg-homedir"),
		GPGVersion:   cmd.String("gpg-version"),
		Key:          cmd.StringSlice("key"),
		Recipient:    cmd.StringSlice("recipient"),
		DecRecipient: cmd.StringSlice("dec-recipient"),
	}
}

// decryptConfig returns the keys that the flags name. If they name none, gpg's
// keyring is asked for those of layers that have a pgp recipient.
func decryptConfig(cmd *cli.Command, layers []ocispec.Descriptor) (*config.DecryptConfig, error) {
	registerKeyProviders()
	args, withPGP := keyArguments(cmd), layers
	taken, err := takeKeys(&args)
	if err != nil {
		return nil, fmt.Errorf("keys: %w", err)
	}
	// gpg's keyring counts only if no key is given.
	if taken != nil && len(args.Key) == 0 || !slices.ContainsFunc(layers, hasPGP) {
		withPGP = nil
	}
	cc, err := parsehelpers.CreateDecryptCryptoConfig(args, withPGP)
	if err != nil && withPGP != nil && !slices.ContainsFunc(layers, onlyPGP) {
		// gpg has no key for it, or can't ask for its password; some other
		// recipient may do.
		cc, err = parsehelpers.CreateDecryptCryptoConfig(args, nil)
	}
	if err != nil {
		return nil, fmt.Errorf("keys: %w", err)
	}
	return config.CombineCryptoConfigs([]config.CryptoConfig{cc, {DecryptConfig: taken}}).DecryptConfig, nil
}

// recipientSchemes are the first words of recipients.
var recipientSchemes = []string{"provider", "jwe", "pkcs7", "pgp", "pkcs11"}

// encryptConfig returns the recipients in args, and the keys to add them to
// layers that are encrypted already.
func encryptConfig(args parsehelpers.EncArgs, layers []ocispec.Descriptor) (*config.EncryptConfig, error) {
	if len(args.Recipient) == 0 {
		return nil, exit.Usagef("no recipient: say who may decrypt the image, as in --recipient provider:pilot:team-a")
	}
	registerKeyProviders()
	for _, r := range args.Recipient {
		scheme, name, ok := strings.Cut(r, ":")
		if !ok || !slices.Contains(recipientSchemes, scheme) {
			return nil, exit.Usagef("recipient %q: use provider:NAME:KEK, jwe:FILE, pkcs7:FILE, pgp:NAME or pkcs11:FILE", r)
		}
		if scheme == "jwe" || scheme == "pkcs7" || scheme == "pkcs11" {
			if err := regular.Check(name, regular.MaxConfig); err != nil {
				return nil, fmt.Errorf("recipient %s: %w", r, err)
			}
		}
		if scheme != "pgp" {
			continue
		}
		// imgcrypt leaves such a recipient out if it finds no gpg.
		if _, err := parsehelpers.CreateGPGClient(args); err != nil {
			return nil, fmt.Errorf("recipient %s: %w", r, err)
		}
	}
	taken, err := takeKeys(&args)
	if err != nil {
		return nil, fmt.Errorf("keys: %w", err)
	}
	if !slices.ContainsFunc(layers, hasPGP) {
		layers = nil
	}
	cc, err := parsehelpers.CreateCryptoConfig(args, layers)
	if err != nil {
		return nil, errArguments(args, err)
	}
	cc.EncryptConfig.AttachDecryptConfig(taken)
	return cc.EncryptConfig, nil
}

// errArguments returns err, which imgcrypt has for recipients and keys, and names the
// recipient that it is about.
func errArguments(args parsehelpers.EncArgs, err error) error {
	for _, r := range args.Recipient {
		one := args
		one.Recipient, one.Key, one.DecRecipient = []string{r}, nil, nil
		if _, err := parsehelpers.CreateCryptoConfig(one, nil); err != nil {
			return fmt.Errorf("recipient %s: %w", r, err)
		}
	}
	return fmt.Errorf("keys: %w", err)
}

func hasPGP(l ocispec.Descriptor) bool {
	return l.Annotations[processor.AnnotationPrefix+"keys.pgp"] != ""
}

// onlyPGP reports whether a layer has pgp recipients and no others.
func onlyPGP(l ocispec.Descriptor) bool {
	for key := range l.Annotations {
		if strings.HasPrefix(key, processor.AnnotationPrefix+"keys.") && !strings.HasSuffix(key, ".pgp") {
			return false
		}
	}
	return hasPGP(l)
}
