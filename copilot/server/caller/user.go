package caller

import (
	"context"
	"fmt"
	"net"

	"github.com/ctrlplane/pilot/internal/certfile"
)

// Context keys of a connection: the user at the other end of a unix socket, and the
// result of verifying the client's certificate.
type (
	userKey     struct{}
	verifiedKey struct{}
)

// OnConnection returns the context of a new connection's requests, which [Identify]
// needs.
func OnConnection(ctx context.Context, c net.Conn) context.Context {
	ctx = context.WithValue(ctx, verifiedKey{}, new(certfile.Verified))
	if user := UserOf(c); user != "" {
		ctx = context.WithValue(ctx, userKey{}, user)
	}
	return ctx
}

// User returns the identity of the user at the other end of a unix socket, uid:N, or ""
// if the request came in another way.
func User(ctx context.Context) string {
	user, _ := ctx.Value(userKey{}).(string)
	return user
}

// UserOf is [User] for a connection, which may be wrapped in others.
func UserOf(c net.Conn) (user string) {
	for {
		wrapper, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		c = wrapper.NetConn()
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return ""
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return ""
	}
	raw.Control(func(fd uintptr) {
		if uid, ok := peer(fd); ok {
			user = fmt.Sprintf("uid:%d", uid)
		}
	})
	return user
}
