// Package kbsplugin gives KEKs of copilot to a Key Broker Service (KBS) of Confidential
// Containers, as a backend of its plugin for external programs. The KBS attests a guest,
// asks its own policy, requests the KEK here, and encrypts it for the guest.
//
// The protocol is described at
// https://github.com/confidential-containers/trustee/blob/main/kbs/docs/ext_plugin.md. It
// does not authenticate the KBS.
package kbsplugin

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// Bounds of a request.
const (
	maxRequest     = 16 << 10 // bytes
	maxConcurrent  = 64       // on one connection
	requestTimeout = 15 * time.Second
)

// Broker has the KEKs, as [keyprovider.Broker] has.
type Broker interface {
	KEK(ctx context.Context, id string, version int) (client.KEK, error)
}

// NewServer returns a server of the service kbs.plugin.v1.KbsPlugin. Each request for a KEK is
// one to the broker: nothing is cached.
func NewServer(b Broker, options ...grpc.ServerOption) *grpc.Server {
	s := grpc.NewServer(append([]grpc.ServerOption{
		grpc.ForceServerCodecV2(codec{}), grpc.MaxRecvMsgSize(maxRequest), grpc.MaxConcurrentStreams(maxConcurrent),
	}, options...)...)
	s.RegisterService(&service, &plugin{b})
	return s
}

var service = grpc.ServiceDesc{
	ServiceName: serviceName,
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{
		method("Handle", (*plugin).handle),
		method("ValidateAuth", (*plugin).validateAuth),
		method("NeedsEncryption", (*plugin).needsEncryption),
	},
}

const serviceName = "kbs.plugin.v1.KbsPlugin"

func method[Response any](name string, do func(*plugin, context.Context, *request) Response) grpc.MethodDesc {
	return grpc.MethodDesc{MethodName: name, Handler: func(srv any, ctx context.Context, decode func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
		in := new(request)
		if err := decode(in); err != nil {
			return nil, err
		}
		call := func(ctx context.Context, in any) (any, error) { return do(srv.(*plugin), ctx, in.(*request)), nil }
		if interceptor == nil {
			return call(ctx, in)
		}
		return interceptor(ctx, in, &grpc.UnaryServerInfo{Server: srv, FullMethod: "/" + serviceName + "/" + name}, call)
	}}
}

type plugin struct{ broker Broker }

// validateAuth says that only the KBS's own admins may do anything but read, which handle
// refuses. Guests have to be attested.
func (*plugin) validateAuth(_ context.Context, in *request) verdict {
	return verdict(in.verb != http.MethodGet)
}

// needsEncryption has the KBS encrypt all answers for the guest.
func (*plugin) needsEncryption(context.Context, *request) verdict { return true }

// handle answers GET /KEK/VERSION with the KEK's 32 bytes.
func (p *plugin) handle(ctx context.Context, in *request) *response {
	log := logrus.WithField("path", fmt.Sprintf("%.200q", strings.Join(in.path, "/")))
	key, status, err := p.kek(ctx, in)
	if err != nil {
		log.WithField("status", status).WithError(err).Warn("KEK not given to the KBS")
		return &response{body: []byte(err.Error()), status: status}
	}
	log.Info("KEK given to the KBS")
	return &response{body: key, status: http.StatusOK}
}

// kek returns the KEK of a request, or the HTTP status of the error.
func (p *plugin) kek(ctx context.Context, in *request) (key []byte, status int, err error) {
	if in.verb != http.MethodGet {
		return nil, http.StatusMethodNotAllowed, fmt.Errorf("%.20q is not possible: KEKs are read here, and managed in copilot", in.verb)
	}
	id, version, ok := wireformat.ParsePluginPath(in.path)
	if !ok || in.query || in.body {
		return nil, http.StatusNotFound, errors.New("it is not KEK/VERSION, as in kbs+external:///copilot/team-a/1")
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	kek, err := p.broker.KEK(ctx, id, version)
	switch {
	case errors.Is(err, client.ErrNotFound):
		return nil, http.StatusNotFound, err
	case errors.Is(err, client.ErrNotExported):
		return nil, http.StatusForbidden, fmt.Errorf("%w: guests need the KEK itself: let this identity export it in copilot's policy, unless it is in a KMS that keeps it", err)
	case errors.Is(err, client.ErrForbidden):
		return nil, http.StatusForbidden, err
	case err != nil:
		return nil, http.StatusServiceUnavailable, err
	case len(kek.Key) != wireformat.KEKSize:
		clear(kek.Key)
		return nil, http.StatusConflict, fmt.Errorf("KEK %q has %d bytes, and guests take %d", id, len(kek.Key), wireformat.KEKSize)
	}
	return kek.Key, http.StatusOK, nil
}
