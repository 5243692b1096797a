package ocicryptclient

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	keyproviderconfig "github.com/containers/ocicrypt/config/keyprovider-config"

	"github.com/ctrlplane/pilot/internal/regular"
	"github.com/ctrlplane/pilot/processor"
)

// FromEnvironment returns the key providers of the ocicrypt.conf that
// $OCICRYPT_KEYPROVIDER_CONFIG names, by name, and none if it is not set. The error may
// be kept for those who need one of them: see [processor.Keys.ProvidersErr].
func FromEnvironment(transport Transport) (map[string]processor.KeyProvider, error) {
	file := os.Getenv(keyproviderconfig.ENVVARNAME)
	if file == "" {
		return nil, nil
	}
	return FromFile(file, transport)
}

// FromFile returns the key providers of an ocicrypt.conf, by name. What is wrong with the
// entry of one is the error of its methods.
func FromFile(file string, transport Transport) (map[string]processor.KeyProvider, error) {
	b, err := regular.ReadText(file, regular.MaxConfig)
	if err != nil {
		return nil, err
	}
	var conf keyproviderconfig.OcicryptConfig
	if err := json.Unmarshal(b, &conf); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	all := make(map[string]processor.KeyProvider)
	for name, attrs := range conf.KeyProviderConfig {
		c, err := New(name, attrs, transport)
		if err != nil {
			all[name] = broken{fmt.Errorf("%s: %w", file, err)}
			continue
		}
		all[name] = c
	}
	return all, nil
}

// broken defers the error of a configuration until its key provider is used.
type broken struct{ err error }

func (b broken) WrapKey(context.Context, [][]byte, []byte) ([]byte, error) { return nil, b.err }

func (b broken) UnwrapKey(context.Context, [][]byte, []byte) ([]byte, error) { return nil, b.err }
