// Package loopbacktest finds ports for servers that tests start as programs.
package loopbacktest

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"syscall"
	"testing"
)

// firstPort is the lowest port that FreeAddress returns.
const firstPort = 10000

// FreeAddress returns a loopback address, IP:PORT, at which nothing listens, for
// a server that can't choose a port and say which. The port is below those that
// the kernel hands out, so neither a connection nor a listener on port 0 takes it
// before the server does, and no other test gets it before this one ends.
func FreeAddress(t testing.TB) string {
	t.Helper()
	for range 1000 {
		if address := take(t, firstPort+rand.IntN(ephemeral(t)-firstPort)); address != "" {
			return address
		}
	}
	t.Fatal("no port is free")
	return ""
}

// take returns a port's address, or nothing if the port is in use or another test's. A test
// has a port by an abstract socket with its name, which all processes see.
func take(t testing.TB, port int) (address string) {
	t.Helper()
	name, err := net.Listen("unix", fmt.Sprintf("@pilot-test-port-%d", port))
	if err != nil {
		return ""
	}
	// A program that another goroutine starts meanwhile would hold the port open for a moment.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		name.Close()
		return ""
	}
	t.Cleanup(func() { name.Close() })
	address = l.Addr().String()
	l.Close()
	return address
}

// ephemeral returns the first port that the kernel hands out.
func ephemeral(t testing.TB) int {
	t.Helper()
	const file = "/proc/sys/net/ipv4/ip_local_port_range"
	first := 32768 // Linux' default
	if b, err := os.ReadFile(file); err == nil {
		if _, err := fmt.Sscan(string(b), &first); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
	}
	if first <= firstPort {
		t.Fatalf("%s: the ports from %d on are handed out by the kernel: the tests need some that are not", file, first)
	}
	return first
}
