package plugin

import (
	"context"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	"github.com/containerd/containerd/v2/contrib/diffservice"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"
)

// Register makes s answer containerd's Diff service with d, as a proxy plugin
// of type diff does. s has to be made with [Interceptor].
func Register(s grpc.ServiceRegistrar, d *Differ) {
	diffapi.RegisterDiffServer(s, diffservice.FromApplierAndComparer(d, d))
}

// Interceptor makes what a request says of its namespace and lease hold for
// the calls back to containerd that serve it.
func Interceptor(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	if namespace, ok := namespaces.Namespace(ctx); ok {
		ctx = namespaces.WithNamespace(ctx, namespace)
	}
	if lease, ok := leases.FromContext(ctx); ok {
		ctx = leases.WithLease(ctx, lease)
	}
	return handle(ctx, req)
}
