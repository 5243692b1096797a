// Package ocicryptclient asks key providers that speak ocicrypt's protocol, over gRPC
// or as executables, as an ocicrypt.conf names them.
//
// It stands in for ocicrypt's own client. A request ends when its context does,
// and it does without the packages of gRPC, which take longer to start than a
// stream processor has work with a small layer. It connects directly: $HTTPS_PROXY
// and targets with an authority, which name a DNS server, are not supported.
package ocicryptclient

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"os/exec"
	"time"

	keyproviderconfig "github.com/containers/ocicrypt/config/keyprovider-config"

	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/keyjson"
)

// maxAnswer bounds an answer, in bytes: gRPC's own bound.
const maxAnswer = 4 << 20

// ErrDenied is the error of a key provider that works, and does not do it: it may
// not use the KEK, or there is none of that name.
var ErrDenied = errors.New("denied")

// Client asks one key provider. It is safe for concurrent use.
type Client struct {
	call func(ctx context.Context, method string, input []byte) ([]byte, error)
}

// New returns a client of the key provider that attrs describe. Nothing is
// connected to or started before the first request.
func New(attrs keyproviderconfig.KeyProviderAttrs) (*Client, error) {
	switch {
	case attrs.Command != nil:
		command := *attrs.Command
		if command.Path == "" {
			return nil, errors.New("its cmd has no path")
		}
		return &Client{func(ctx context.Context, _ string, input []byte) ([]byte, error) {
			return run(ctx, command, input)
		}}, nil
	case attrs.Grpc != "":
		s, err := newServer(attrs.Grpc, attrs.GrpcTLS)
		if err != nil {
			return nil, err
		}
		return &Client{s.call}, nil
	}
	return nil, errors.New("it has neither cmd nor grpc")
}

// WrapKey passes on a keywrap request, in the JSON of ocicrypt's key provider
// protocol, and returns the answer. The error is what the key provider said, or
// why it could not be asked.
func (c *Client) WrapKey(ctx context.Context, input []byte) ([]byte, error) {
	return c.call(ctx, "/keyprovider.KeyProviderService/WrapKey", input)
}

// UnwrapKey is WrapKey for a keyunwrap request.
func (c *Client) UnwrapKey(ctx context.Context, input []byte) ([]byte, error) {
	return c.call(ctx, "/keyprovider.KeyProviderService/UnWrapKey", input)
}

// closeWithin is how long what an executable leaves running may hold its
// output open.
const closeWithin = time.Second

// run asks a key provider that is an executable.
func run(ctx context.Context, command keyproviderconfig.Command, input []byte) ([]byte, error) {
	cmd := exec.CommandContext(ctx, command.Path, command.Args...)
	cmd.WaitDelay = closeWithin
	cmd.Stdin = bytes.NewReader(input)
	answer, said := new(answerBuffer), new(tail)
	cmd.Stdout, cmd.Stderr = answer, said
	err := cmd.Run()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil // it succeeded, and left something running, such as an agent
	}
	if err != nil {
		if e := new(exec.ExitError); errors.As(err, &e) && e.ExitCode() == exit.Denied {
			err = &deniedError{err}
		}
		err = fmt.Errorf("%s: %w", command.Path, err)
		if said := bytes.TrimSpace(said.kept); len(said) > 0 {
			err = fmt.Errorf("%w: %s", err, said)
		}
		return nil, err
	}
	if len(answer.kept) > maxAnswer {
		return nil, fmt.Errorf("%s answers more than %d bytes", command.Path, maxAnswer)
	}
	return answer.kept, nil
}

// deniedError is the error of an executable, such as pilot's, that exited with the
// status for a denial.
type deniedError struct{ error }

func (e *deniedError) Unwrap() []error { return []error{e.error, ErrDenied} }

// answerBuffer keeps an answer, and a byte more of one that is too long.
type answerBuffer struct{ kept []byte }

func (a *answerBuffer) Write(p []byte) (int, error) {
	a.kept = keyjson.Append(a.kept, p[:min(len(p), maxAnswer+1-len(a.kept))])
	return len(p), nil
}

// maxSaid bounds what is told of an executable's standard error, in bytes: of
// its end, which is where the cause is.
const maxSaid = 4096

// tail keeps the end of what is written to it.
type tail struct{ kept []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.kept = append(t.kept, p...)
	t.kept = t.kept[max(0, len(t.kept)-maxSaid):]
	return len(p), nil
}

// tlsConfig reads the files of the TLS that an ocicrypt.conf asks for, of a
// server on host.
func tlsConfig(attrs *keyproviderconfig.GrpcTLS, host string) (*tls.Config, error) {
	conf := &tls.Config{
		ServerName:         cmp.Or(attrs.ServerName, host),
		InsecureSkipVerify: attrs.InsecureSkipVerify,
		NextProtos:         []string{"h2"},
	}
	if attrs.RootCAFile != "" {
		var err error
		if conf.RootCAs, err = certfile.Pool(attrs.RootCAFile); err != nil {
			return nil, fmt.Errorf("root-ca-file: %w", err)
		}
	}
	if attrs.CertFile != "" || attrs.KeyFile != "" {
		pair, err := certfile.KeyPair(attrs.CertFile, attrs.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("cert-file and key-file: %w", err)
		}
		conf.Certificates = []tls.Certificate{pair}
	}
	return conf, nil
}
