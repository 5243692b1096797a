package keyprovider

import (
	"context"
	"encoding/json"
	"errors"

	"github.com/containers/ocicrypt"
	"github.com/containers/ocicrypt/config"
	"github.com/containers/ocicrypt/keywrap"
	protocol "github.com/containers/ocicrypt/keywrap/keyprovider"
)

// RegisterInProcess makes ocicrypt ask p in this process, where it would
// otherwise ask the key provider of that name over a socket.
func RegisterInProcess(p *Provider) {
	ocicrypt.RegisterKeyWrapper("provider."+p.conf.Name, inProcess{p})
}

// inProcess is ocicrypt's own wrapper for key providers, but for the way that
// the requests take.
type inProcess struct{ provider *Provider }

var _ keywrap.KeyWrapper = inProcess{}

func (w inProcess) WrapKeys(ec *config.EncryptConfig, optsData []byte) ([]byte, error) {
	if len(ec.Parameters[w.provider.conf.Name]) == 0 {
		return nil, nil
	}
	out, err := call(protocol.KeyProviderKeyWrapProtocolInput{
		Operation:     protocol.OpKeyWrap,
		KeyWrapParams: protocol.KeyWrapParams{Ec: ec, OptsData: optsData},
	}, w.provider.WrapKey)
	return out.KeyWrapResults.Annotation, err
}

func (w inProcess) UnwrapKey(dc *config.DecryptConfig, annotation []byte) ([]byte, error) {
	out, err := call(protocol.KeyProviderKeyWrapProtocolInput{
		Operation:       protocol.OpKeyUnwrap,
		KeyUnwrapParams: protocol.KeyUnwrapParams{Dc: dc, Annotation: annotation},
	}, w.provider.UnwrapKey)
	return out.KeyUnwrapResults.OptsData, err
}

func call(in protocol.KeyProviderKeyWrapProtocolInput, op func(context.Context, []byte) ([]byte, error)) (out protocol.KeyProviderKeyWrapProtocolOutput, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), answerWithin)
	defer cancel()
	b, err := json.Marshal(in)
	if err != nil {
		return out, err
	}
	defer clear(b)
	answer, err := op(ctx, b)
	if err != nil {
		return out, err
	}
	defer clear(answer)
	return out, json.Unmarshal(answer, &out)
}

func (w inProcess) GetAnnotationID() string {
	return "org.opencontainers.image.enc.keys.provider." + w.provider.conf.Name
}

func (inProcess) NoPossibleKeys(map[string][][]byte) bool { return false }

func (inProcess) GetPrivateKeys(map[string][][]byte) [][]byte { return nil }

func (inProcess) GetKeyIdsFromPacket(string) ([]uint64, error) { return nil, nil }

func (inProcess) GetRecipients(string) ([]string, error) {
	return nil, errors.New("a key provider does not tell its recipients")
}
