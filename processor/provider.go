package processor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/containers/ocicrypt/config"
	keyproviderconfig "github.com/containers/ocicrypt/config/keyprovider-config"

	"github.com/ctrlplane/pilot/internal/keyjson"
	"github.com/ctrlplane/pilot/internal/ocicryptclient"
	"github.com/ctrlplane/pilot/internal/regular"
)

// KeyProvider wraps and unwraps layer keys for others. Requests and answers are
// the JSON of ocicrypt's key provider protocol:
// https://github.com/containers/ocicrypt/blob/main/docs/keyprovider.md.
type KeyProvider interface {
	WrapKey(ctx context.Context, input []byte) ([]byte, error)
	UnwrapKey(ctx context.Context, input []byte) ([]byte, error)
}

// providers are those that are known, by name.
var providers struct {
	mu     sync.Mutex
	byName map[string]KeyProvider
	err    error // why there are none of a file
}

// RegisterKeyProvider makes p answer for the key provider of that name, whatever
// was registered for it before.
func RegisterKeyProvider(name string, p KeyProvider) {
	providers.mu.Lock()
	defer providers.mu.Unlock()
	if providers.byName == nil {
		providers.byName = make(map[string]KeyProvider)
	}
	providers.byName[name] = p
}

// RegisterKeyProviders registers the key providers of an ocicrypt.conf. Those of
// the file that $OCICRYPT_KEYPROVIDER_CONFIG names are known without. An error
// may be ignored: it is part of the error of a layer that needs a key provider
// which is not known.
func RegisterKeyProviders(file string) error {
	all, err := readProviders(file)
	for name, p := range all {
		RegisterKeyProvider(name, p)
	}
	if err != nil {
		providers.mu.Lock()
		defer providers.mu.Unlock()
		providers.err = err
	}
	return err
}

// fromEnvironment are the key providers that ocicrypt knows by itself.
var fromEnvironment = sync.OnceValues(func() (map[string]KeyProvider, error) {
	file := os.Getenv(keyproviderconfig.ENVVARNAME)
	if file == "" {
		return nil, nil
	}
	return readProviders(file)
})

func readProviders(file string) (map[string]KeyProvider, error) {
	b, err := regular.Read(file, regular.MaxConfig)
	if err != nil {
		return nil, err
	}
	var conf keyproviderconfig.OcicryptConfig
	if err := json.Unmarshal(b, &conf); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	all := make(map[string]KeyProvider)
	for name, attrs := range conf.KeyProviderConfig {
		c, err := ocicryptclient.New(attrs)
		if err != nil {
			all[name] = broken{fmt.Errorf("%s: %w", file, err)}
			continue
		}
		all[name] = c
	}
	return all, nil
}

// broken is a key provider whose configuration makes no sense, which is nobody's
// concern who does not need it.
type broken struct{ err error }

func (b broken) WrapKey(context.Context, []byte) ([]byte, error) { return nil, b.err }

func (b broken) UnwrapKey(context.Context, []byte) ([]byte, error) { return nil, b.err }

// provider returns the key provider of that name.
func provider(name string) (KeyProvider, error) {
	providers.mu.Lock()
	p, unread := providers.byName[name], providers.err
	providers.mu.Unlock()
	if p != nil {
		return p, nil
	}
	all, err := fromEnvironment()
	if p := all[name]; p != nil {
		return p, nil
	}
	if err == nil {
		err = unread
	}
	missing := fmt.Errorf("key provider %.60q is not configured: name it in the file that $%s points to", name, keyproviderconfig.ENVVARNAME)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", missing, err)
	}
	return nil, missing
}

// providerWrapper has a key provider wrap and unwrap. It is told the parameters
// that are meant for it and no others.
type providerWrapper struct {
	name     string
	provider KeyProvider
}

// What follows is the protocol's. Some key providers want the members of a
// request that it does not use, too, as ocicrypt sends them: with nulls.
type wrapParams struct {
	Ec       *config.EncryptConfig `json:"ec"`
	OptsData []byte                `json:"optsdata"`
}

type unwrapParams struct {
	Dc         *config.DecryptConfig `json:"dc"`
	Annotation []byte                `json:"annotation"`
}

type answer struct {
	Wrap struct {
		Annotation []byte `json:"annotation"`
	} `json:"keywrapresults"`
	Unwrap struct {
		OptsData []byte `json:"optsdata"`
	} `json:"keyunwrapresults"`
}

func (providerWrapper) possible(*config.DecryptConfig) bool { return true }

func (w providerWrapper) wrap(ctx context.Context, ec *config.EncryptConfig, private []byte) ([]byte, error) {
	own := &config.EncryptConfig{Parameters: map[string][][]byte{w.name: ec.Parameters[w.name]}}
	params := keyjson.Object(keyjson.Value("ec", own), keyjson.Key("optsdata", private))
	defer clear(params)
	out, err := ask(ctx, w.provider.WrapKey,
		keyjson.Object(keyjson.Value("op", "keywrap"), keyjson.Raw("keywrapparams", params), keyjson.Value("keyunwrapparams", unwrapParams{})))
	return out.Wrap.Annotation, err
}

func (w providerWrapper) unwrap(ctx context.Context, dc *config.DecryptConfig, wrapped []byte) ([]byte, error) {
	own := &config.DecryptConfig{}
	if params := dc.Parameters[w.name]; len(params) > 0 {
		own.Parameters = map[string][][]byte{w.name: params}
	}
	out, err := ask(ctx, w.provider.UnwrapKey,
		keyjson.Object(keyjson.Value("op", "keyunwrap"), keyjson.Value("keywrapparams", wrapParams{}), keyjson.Value("keyunwrapparams", unwrapParams{own, wrapped})))
	return out.Unwrap.OptsData, err
}

func ask(ctx context.Context, call func(context.Context, []byte) ([]byte, error), input []byte) (answer, error) {
	b, err := call(ctx, input)
	if err != nil {
		return answer{}, err
	}
	clear(input) // which nobody reads any more
	defer clear(b)
	var out answer
	if json.Unmarshal(b, &out) != nil {
		// The error of encoding/json may quote its input, which holds keys.
		return answer{}, errors.New("its answer is not the JSON of ocicrypt's key provider protocol")
	}
	return out, nil
}
