// Package ocicryptclient has the key providers that an ocicrypt.conf names, which are
// other programs: gRPC servers and executables that speak ocicrypt's key provider
// protocol. The file and the protocol are described at
// https://github.com/containers/ocicrypt/blob/main/docs/keyprovider.md.
//
// It stands in for ocicrypt's own client: a request ends when its context does.
// It connects directly: $HTTPS_PROXY and targets with an authority, which name a DNS
// server, are not supported.
//
// How gRPC servers are called is the caller's choice, a [Transport]: that of package
// grpcdial below this one, which is gRPC's own client.
package ocicryptclient

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containers/ocicrypt/config"
	keyproviderconfig "github.com/containers/ocicrypt/config/keyprovider-config"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/keyjson"
	"github.com/ctrlplane/pilot/processor"
)

// MaxAnswer bounds an answer, in bytes: gRPC's own bound.
const MaxAnswer = 4 << 20

// Operation is what a request of the protocol asks for: its member op.
type Operation string

// The operations of the protocol.
const (
	Wrap   Operation = "keywrap"
	Unwrap Operation = "keyunwrap"
)

// Client is a key provider that is another program. It is a [processor.KeyProvider],
// safe for concurrent use.
type Client struct {
	name string
	call func(ctx context.Context, op Operation, request []byte) ([]byte, error)
}

// New returns a client of the key provider that has this name and these attributes in an
// ocicrypt.conf. Nothing is connected to or started before the first request. transport
// may be nil if the attributes name an executable.
func New(name string, attrs keyproviderconfig.KeyProviderAttrs, transport Transport) (*Client, error) {
	switch {
	case attrs.Command != nil:
		command := *attrs.Command
		if command.Path == "" {
			return nil, errors.New("its cmd has no path")
		}
		return &Client{name, func(ctx context.Context, _ Operation, request []byte) ([]byte, error) {
			return run(ctx, command, request)
		}}, nil
	case attrs.Grpc != "":
		server, err := newServer(attrs.Grpc, attrs.GrpcTLS)
		if err != nil {
			return nil, err
		}
		if transport == nil {
			return nil, errors.New("this program calls no key provider over gRPC")
		}
		return &Client{name, func(ctx context.Context, op Operation, request []byte) ([]byte, error) {
			return call(ctx, transport, server, op, request)
		}}, nil
	}
	return nil, errors.New("it has neither cmd nor grpc")
}

// WrapKey implements [processor.KeyProvider]. The error is that of the key provider, or
// says why it could not be called.
func (c *Client) WrapKey(ctx context.Context, params [][]byte, layerKey []byte) ([]byte, error) {
	own := &config.EncryptConfig{Parameters: map[string][][]byte{c.name: params}}
	wrap := keyjson.Object(keyjson.Value("ec", own), keyjson.Key("optsdata", layerKey))
	defer clear(wrap)
	out, err := c.ask(ctx, Wrap,
		keyjson.Object(keyjson.Value("op", Wrap), keyjson.Raw("keywrapparams", wrap), keyjson.Value("keyunwrapparams", unwrapParams{})))
	return out.Wrap.Annotation, err
}

// UnwrapKey implements [processor.KeyProvider].
func (c *Client) UnwrapKey(ctx context.Context, params [][]byte, annotation []byte) ([]byte, error) {
	own := &config.DecryptConfig{}
	if len(params) > 0 {
		own.Parameters = map[string][][]byte{c.name: params}
	}
	out, err := c.ask(ctx, Unwrap,
		keyjson.Object(keyjson.Value("op", Unwrap), keyjson.Value("keywrapparams", wrapParams{}), keyjson.Value("keyunwrapparams", unwrapParams{own, annotation})))
	return out.Unwrap.OptsData, err
}

// ocicrypt's own types are in a package that imports gRPC. Some key providers want the
// members of a request that its operation does not use too, as ocicrypt sends them: with
// nulls.
type wrapParams struct {
	Ec       *config.EncryptConfig `json:"ec"`
	OptsData []byte                `json:"optsdata"`
}

type unwrapParams struct {
	Dc         *config.DecryptConfig `json:"dc"`
	Annotation []byte                `json:"annotation"`
}

type response struct {
	Wrap struct {
		Annotation []byte `json:"annotation"`
	} `json:"keywrapresults"`
	Unwrap struct {
		OptsData []byte `json:"optsdata"`
	} `json:"keyunwrapresults"`
}

// ask sends a request, which it clears.
func (c *Client) ask(ctx context.Context, op Operation, request []byte) (out response, err error) {
	defer clear(request)
	answer, err := c.Forward(ctx, op, request)
	if err != nil {
		return out, err
	}
	defer clear(answer)
	if json.Unmarshal(answer, &out) != nil {
		// The error of encoding/json may quote its input, which holds keys.
		return response{}, errors.New("its answer is not the JSON of ocicrypt's key provider protocol")
	}
	return out, nil
}

// Forward passes a request in the JSON of the protocol on as it is, and returns the
// answer, of at most [MaxAnswer] bytes, which the caller clears.
func (c *Client) Forward(ctx context.Context, op Operation, request []byte) ([]byte, error) {
	return c.call(ctx, op, request)
}

// waitDelay is how long processes that an executable leaves behind may hold its output
// open.
const waitDelay = time.Second

// run runs a key provider that is an executable.
func run(ctx context.Context, command keyproviderconfig.Command, request []byte) ([]byte, error) {
	cmd := exec.CommandContext(ctx, command.Path, command.Args...)
	cmd.WaitDelay = waitDelay
	cmd.Stdin = bytes.NewReader(request)
	answer, stderr := new(answerBuffer), new(tail)
	cmd.Stdout, cmd.Stderr = answer, stderr
	err := cmd.Run()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil // it succeeded, and left something running, such as an agent
	}
	if err != nil {
		return nil, failed(command.Path, err, string(bytes.TrimSpace(stderr.b)))
	}
	if len(answer.b) > MaxAnswer {
		return nil, fmt.Errorf("%s answers more than %d bytes", command.Path, MaxAnswer)
	}
	return answer.b, nil
}

// failed returns the error of an executable, which is what it printed if it exited by
// itself. It wraps [processor.ErrDenied] if the status is that of a denial.
func failed(path string, err error, printed string) error {
	e := new(exec.ExitError)
	if exited := errors.As(err, &e) && e.Exited(); exited && printed != "" {
		// Programs begin with their name.
		err = errors.New(strings.TrimPrefix(printed, strings.TrimSuffix(filepath.Base(path), ".exe")+": "))
	} else if printed != "" {
		err = fmt.Errorf("%w: %s", err, printed)
	}
	err = fmt.Errorf("%s: %w", path, err)
	if e.ProcessState != nil && e.ExitCode() == exit.Denied {
		err = &deniedError{err}
	}
	return err
}

// deniedError is the error of an executable, such as pilot's, that exited with the
// status for a denial.
type deniedError struct{ error }

func (e *deniedError) Unwrap() []error { return []error{e.error, processor.ErrDenied} }

// answerBuffer keeps an answer, and a byte more of one that is too long.
type answerBuffer struct{ b []byte }

func (a *answerBuffer) Write(p []byte) (int, error) {
	a.b = keyjson.Append(a.b, p[:min(len(p), MaxAnswer+1-len(a.b))])
	return len(p), nil
}

// maxStderr bounds what is quoted of an executable's standard error, in bytes: of its
// end, which has the cause.
const maxStderr = 4096

// tail keeps the end of what is written to it.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	t.b = t.b[max(0, len(t.b)-maxStderr):]
	return len(p), nil
}

// methods are the gRPC methods of the operations.
var methods = map[Operation]string{
	Wrap:   "/keyprovider.KeyProviderService/WrapKey",
	Unwrap: "/keyprovider.KeyProviderService/UnWrapKey",
}

// call calls a key provider that is a gRPC server.
func call(ctx context.Context, transport Transport, server *Server, op Operation, request []byte) ([]byte, error) {
	answer, err := transport(ctx, server, methods[op], request)
	if errors.Is(err, ErrNoAnswer) {
		answer, err = transport(ctx, server, methods[op], request) // it may be restarting
	}
	if status := new(StatusError); err != nil && !errors.As(err, &status) {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if errors.Is(err, fs.ErrPermission) {
			err = fmt.Errorf("%w: other users than the daemon's name pilot as a cmd in their ocicrypt.conf, with a pilot.toml of their own", err)
		}
		return nil, fmt.Errorf("key provider at %s: %w", server.target, err)
	}
	return answer, err
}
