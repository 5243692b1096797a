// Package loopback recognizes this machine's own names and addresses, for what is
// allowed only if it does not leave the machine.
package loopback

import "net"

// Is reports whether host, without a port, is this machine: localhost, or a
// loopback address. Other names count as elsewhere, whatever they resolve to.
func Is(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
