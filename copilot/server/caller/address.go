package caller

import (
	"net"
	"net/http"
	"net/netip"
	"strings"
)

// Address returns the name of the caller at an address, HOST:PORT.
func Address(address string) string {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		host = address
	}
	return "from " + host
}

// Network returns the caller that all requests from one address, HOST:PORT, count for
// as long as they are not authenticated. An IPv6 address stands for its /64 network, since
// one machine can use all of its addresses.
func Network(address string) string {
	from := Address(address)
	ip, err := netip.ParseAddr(strings.TrimPrefix(from, "from "))
	if err != nil || !ip.Is6() || ip.Is4In6() || ip.IsLoopback() {
		return from
	}
	prefix, err := ip.WithZone("").Prefix(64)
	if err != nil {
		return from
	}
	return "from " + prefix.String()
}

// Source is [Network] for a request. All users of a unix socket have the same address,
// so each user is a caller of its own.
func Source(r *http.Request) string {
	if user := User(r.Context()); user != "" {
		return "from " + user
	}
	return Network(r.RemoteAddr)
}
