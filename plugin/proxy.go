package plugin

import (
	"context"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/contrib/diffservice"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/ctrlplane/pilot/internal/localstore"
	"github.com/ctrlplane/pilot/processor"
)

// Dial returns a client of the containerd that listens on the unix socket address,
// such as /run/containerd/containerd.sock. It connects when it is used, so
// containerd may be started later, and restarted.
func Dial(address string) (*containerd.Client, error) {
	// Until it tries again, calls fail, and so do pulls and containers right after containerd has
	// started.
	again := backoff.DefaultConfig
	again.BaseDelay, again.MaxDelay = 50*time.Millisecond, 200*time.Millisecond
	conn, err := grpc.NewClient("unix://"+address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: again, MinConnectTimeout: 5 * time.Second}),
		grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(defaults.DefaultMaxRecvMsgSize),
			grpc.MaxCallSendMsgSize(defaults.DefaultMaxSendMsgSize)))
	if err != nil {
		return nil, err
	}
	return containerd.NewWithConn(conn)
}

// NewServer returns a server that answers the containerd of client (see [Dial]) as a proxy
// plugin of type diff. The caller serves it on a unix socket that only root can use.
// opts are for the server; interceptors in them come before its own.
//
// The server leaves comparing snapshots to containerd's next differ: containerd does not
// pass the caller's lease to a proxy plugin, and without one its garbage collector may
// remove the result at once.
func NewServer(client *containerd.Client, conf Config, opts ...grpc.ServerOption) *grpc.Server {
	s := grpc.NewServer(append(slices.Clip(opts), grpc.ChainUnaryInterceptor(interceptor(client)))...)
	d := New(localstore.New(client), client.MountManager(), conf)
	diffapi.RegisterDiffServer(s, diffservice.FromApplierAndComparer(d, comparesNothing{}))
	return s
}

// comparesNothing makes containerd ask its next differ.
type comparesNothing struct{}

func (comparesNothing) Compare(context.Context, []mount.Mount, []mount.Mount, ...diff.Opt) (ocispec.Descriptor, error) {
	return ocispec.Descriptor{}, fmt.Errorf("pilot: comparing snapshots is left to containerd's own differ: put 'walking' after 'pilot' in the diff service's default: %w", errdefs.ErrNotImplemented)
}

// interceptor returns an interceptor that passes a request's namespace on to the calls
// that it makes back to containerd. Requests of other services than Diff pass unchanged.
func interceptor(client *containerd.Client) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (_ any, err error) {
		if !strings.HasPrefix(info.FullMethod, "/"+diffapi.Diff_ServiceDesc.ServiceName+"/") {
			return handle(ctx, req)
		}
		defer func() {
			// One request must not end the others.
			if p := recover(); p != nil {
				logrus.WithField("panic", p).Error(string(debug.Stack()))
				err = status.Errorf(codes.Internal, "pilot: this is a bug, see its log: %v", p)
			}
		}()
		namespace, ok := namespaces.Namespace(ctx)
		if !ok {
			if namespace, err = missingNamespace(ctx, client, req); err != nil {
				return nil, errgrpc.ToGRPC(err)
			}
		}
		return handle(namespaces.WithNamespace(ctx, namespace), req)
	}
}

// missingNamespace finds the namespace of a request without one, such as those that
// Debian 13's containerd 1.7.24 passes on for clients of its diff service. Plain layers
// are left to the built-in differ: that is what ErrNotImplemented means to containerd.
func missingNamespace(ctx context.Context, client *containerd.Client, req any) (string, error) {
	apply, ok := req.(*diffapi.ApplyRequest)
	if !ok || !processor.IsEncrypted(apply.GetDiff().GetMediaType()) {
		return "", fmt.Errorf("pilot: containerd does not say in which namespace: %w", errdefs.ErrNotImplemented)
	}
	list, err := client.NamespaceService().List(ctx)
	if err != nil {
		return "", err
	}
	for _, namespace := range list {
		_, err := client.ContentStore().Info(namespaces.WithNamespace(ctx, namespace), digest.Digest(apply.Diff.Digest))
		if err == nil {
			return namespace, nil
		}
		if !errdefs.IsNotFound(err) {
			return "", err
		}
	}
	return "", fmt.Errorf("pilot: layer %s: no namespace has it: %w", apply.Diff.Digest, errdefs.ErrNotFound)
}
