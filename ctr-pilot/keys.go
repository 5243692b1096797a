package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/imgcrypt/v2/images/encryption/parsehelpers"
	"github.com/containers/ocicrypt/config"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/regular"
	"github.com/ctrlplane/pilot/internal/wireformat"
	"github.com/ctrlplane/pilot/processor"
)

// withProviders returns the key providers of a command and dc, private keys.
func withProviders(cmd *cli.Command, dc *config.DecryptConfig) processor.Keys {
	providers, err := keyProviders(cmd)
	return processor.Keys{Providers: providers, ProvidersErr: err, Private: dc}
}

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
	args, withPGP := keyArguments(cmd), layers
	taken, err := takeKeys(&args)
	if err != nil {
		return nil, fmt.Errorf("keys: %w", err)
	}
	// gpg's keyring counts only if no key is given.
	if taken != nil && len(args.Key) == 0 || !slices.ContainsFunc(layers, hasPGP) || processor.CheckScheme("pgp") != nil {
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

// cocoPrefix begins recipients that are KEKs for guests of Confidential Containers.
const cocoPrefix = "coco:"

func isCoCo(recipient string) bool { return strings.HasPrefix(recipient, cocoPrefix) }

// recipientSchemes are the first words of recipients.
var recipientSchemes = []string{"provider", "hpke", "coco", "jwe", "pkcs7", "pgp", "pkcs11"}

// checkRecipients checks how recipients are spelled, and that there is one.
func checkRecipients(list []string) error {
	if len(list) == 0 {
		return exit.Usagef("no recipient: say who may decrypt the image, as in --recipient provider:pilot:team-a")
	}
	for _, r := range list {
		scheme, _, ok := strings.Cut(r, ":")
		if !ok || !slices.Contains(recipientSchemes, scheme) {
			return exit.Usagef("recipient %q: use provider:NAME:KEK, hpke:FILE, coco:KEK, jwe:FILE, pkcs7:FILE, pgp:NAME or pkcs11:FILE", r)
		}
		if err := processor.CheckScheme(scheme); err != nil {
			return fmt.Errorf("recipient %s: %w", r, err)
		}
	}
	return nil
}

// newRecipients returns the recipients in args, and the keys to add them to layers that are
// encrypted already.
func newRecipients(cmd *cli.Command, args parsehelpers.EncArgs, layers []ocispec.Descriptor) (processor.Recipients, error) {
	var none processor.Recipients
	if err := checkRecipients(args.Recipient); err != nil {
		return none, err
	}
	for _, r := range args.Recipient {
		scheme, name, _ := strings.Cut(r, ":")
		if scheme == "jwe" || scheme == "pkcs7" || scheme == "pkcs11" {
			if err := regular.Check(name, regular.MaxConfig); err != nil {
				return none, fmt.Errorf("recipient %s: %w", r, err)
			}
		}
		if scheme != "pgp" {
			continue
		}
		// imgcrypt leaves such a recipient out if it finds no gpg.
		if _, err := parsehelpers.CreateGPGClient(args); err != nil {
			return none, fmt.Errorf("recipient %s: %w", r, err)
		}
	}
	public, provider, err := publicRecipients(cmd)
	if err != nil {
		return none, err
	}
	args.Recipient = slices.Clone(args.Recipient)
	for i, r := range args.Recipient {
		if key, ok := public[r]; ok {
			args.Recipient[i] = "provider:" + provider + ":" + key.ID
		}
		if isCoCo(r) {
			args.Recipient[i] = "provider:" + wireformat.CoCoProvider + ":" + strings.TrimPrefix(r, cocoPrefix)
		}
	}
	taken, err := takeKeys(&args)
	if err != nil {
		return none, fmt.Errorf("keys: %w", err)
	}
	if !slices.ContainsFunc(layers, hasPGP) || processor.CheckScheme("pgp") != nil {
		layers = nil
	}
	cc, err := parsehelpers.CreateCryptoConfig(args, layers)
	if err != nil {
		return none, errArguments(args, err)
	}
	cc.EncryptConfig.AttachDecryptConfig(taken)
	return processor.Recipients{Keys: withProviders(cmd, &cc.EncryptConfig.DecryptConfig), Parameters: cc.EncryptConfig.Parameters}, nil
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
