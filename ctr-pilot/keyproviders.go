package main

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	keyproviderconfig "github.com/containers/ocicrypt/config/keyprovider-config"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/internal/configfile"
	"github.com/ctrlplane/pilot/internal/wireformat"
	"github.com/ctrlplane/pilot/keyprovider"
	"github.com/ctrlplane/pilot/keyprovider/brokerconfig"
	"github.com/ctrlplane/pilot/processor"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
	"github.com/ctrlplane/pilot/processor/ocicryptclient/grpcdial"
)

// defaultKeyProviders names the key providers when no variable does.
var defaultKeyProviders = configfile.Default("pilot", "ocicrypt.conf")

var keyProvidersHelp = `
Key providers are those of the file that OCICRYPT_KEYPROVIDER_CONFIG names, or else
of ` + defaultKeyProviders + `. Without either, or with a flag that is a setting of
pilot's, this command is the key provider pilot itself: it asks the broker that
--broker, PILOT_BROKER or pilot.toml names.
`

// commandProviders are the key providers of this process's command, once they are known.
var commandProviders struct {
	sync.Once
	all map[string]processor.KeyProvider
	err error
}

// keyProviders returns the key providers of a command. An error is for layers that need one
// that is missing.
func keyProviders(cmd *cli.Command) (map[string]processor.KeyProvider, error) {
	c := &commandProviders
	c.Do(func() {
		c.all, c.err = findKeyProviders(cmd)
		c.all, c.err = withPublicKeys(cmd, c.all, c.err)
	})
	return c.all, c.err
}

// checkKeyProviders returns the error of settings in flags before anything is done.
func checkKeyProviders(cmd *cli.Command) error {
	if !brokerconfig.Given(cmd) {
		return nil
	}
	_, err := keyProviders(cmd)
	return err
}

func findKeyProviders(cmd *cli.Command) (map[string]processor.KeyProvider, error) {
	given, coco := brokerconfig.Given(cmd), slices.ContainsFunc(cmd.StringSlice("recipient"), isCoCo)
	file := os.Getenv(keyproviderconfig.ENVVARNAME)
	byDefault := file == ""
	if byDefault {
		file = defaultKeyProviders
	}
	named, err := ocicryptclient.FromFile(file, grpcdial.Call)
	if byDefault && errors.Is(err, fs.ErrNotExist) {
		err = nil
	} else if !given && !coco {
		return named, err
	}
	own, ownErr := ownKeyProvider(cmd)
	if ownErr != nil {
		return named, ownErr
	}
	all := maps.Clone(own)
	for name, p := range named {
		// The file counts, except against flags. The name attestation-agent is another project's: a
		// recipient coco:KEK names one of copilot's KEKs, which that project's own key provider does
		// not know, and without such a recipient it is the file's.
		ours := given
		if name == wireformat.CoCoProvider {
			ours = coco
		}
		if all[name] == nil || !ours {
			all[name] = p
		}
	}
	return all, err
}

const (
	// kekTTL is how long a KEK is kept: as long as by "pilot serve".
	kekTTL = 5 * time.Minute
	// maxKEKs bounds the KEKs that are kept.
	maxKEKs = 1024
)

// ownKeyProvider returns pilot's key provider, which asks the broker from here, by its names.
func ownKeyProvider(cmd *cli.Command) (map[string]processor.KeyProvider, error) {
	conf, err := brokerconfig.Read(cmd)
	if err != nil {
		return nil, err
	}
	if len(conf.Broker) == 0 && !withoutBroker(cmd, conf) {
		return nil, fmt.Errorf("ctr-pilot asks the broker itself if --broker https://HOST:PORT, PILOT_BROKER or broker in %s names it", brokerconfig.DefaultFile)
	}
	var broker keyprovider.Broker
	if len(conf.Broker) > 0 {
		if broker, err = conf.Client(); err != nil {
			return nil, err
		}
	}
	providerConf := conf.ProviderConfig()
	providerConf.CacheTTL, providerConf.CacheSize = kekTTL, maxKEKs
	p := keyprovider.New(broker, providerConf)
	all := map[string]processor.KeyProvider{wireformat.CoCoProvider: keyprovider.CoCo(func() *keyprovider.Provider { return p })}
	for _, name := range conf.ProviderName {
		if name == wireformat.CoCoProvider {
			continue
		}
		all[name] = p
	}
	return all, nil
}

// withoutBroker reports whether pilot's key provider can be of use without a broker: it has
// public keys or identities of age, or a recipient is a public key or one of age.
func withoutBroker(cmd *cli.Command, conf brokerconfig.Settings) bool {
	return len(conf.PublicKeys)+len(conf.AgeIdentities) > 0 || slices.ContainsFunc(cmd.StringSlice("recipient"), func(r string) bool {
		parts := strings.SplitN(r, ":", 3)
		return strings.HasPrefix(r, hpkePrefix) || len(parts) == 3 && parts[0] == "provider" && slices.Contains(conf.ProviderName, parts[1]) && wireformat.IsAgeRecipient(parts[2])
	})
}
