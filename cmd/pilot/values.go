package main

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"

	"github.com/ctrlplane/pilot/internal/loopback"
	"github.com/ctrlplane/pilot/internal/setting"
)

// registryPatterns are patterns of registries, separated by commas in text.
type registryPatterns []string

func (r *registryPatterns) String() string { return strings.Join(*r, ",") }

func (r *registryPatterns) UnmarshalText(b []byte) error {
	return setting.Words((*[]string)(r), b, func(pattern string, _ []string) error {
		if !registryPattern.MatchString(pattern) {
			return fmt.Errorf("%.80q is neither a registry nor a pattern of some, as in *.example.com", pattern)
		}
		return nil
	})
}

// workloadPatterns are patterns of workloads, separated by commas in text.
type workloadPatterns []string

func (p *workloadPatterns) String() string { return strings.Join(*p, ",") }

func (p *workloadPatterns) UnmarshalText(b []byte) error {
	return setting.Words((*[]string)(p), b, func(pattern string, _ []string) error {
		if !strings.Contains(pattern, "/") && !strings.Contains(pattern, "**") {
			return fmt.Errorf("%.80q matches no workload: they are NAMESPACE/SERVICEACCOUNT, as in prod/*", pattern)
		}
		return nil
	})
}

var registryPattern = regexp.MustCompile(`^[A-Za-z0-9.*:_\[\]-]+$`)

// address is an address to listen on: unix:///PATH or HOST:PORT.
type address string

func (a *address) UnmarshalText(b []byte) error {
	v := address(b)
	if path, ok := v.unix(); ok {
		if runtime.GOOS == "windows" {
			return fmt.Errorf("%q: file modes keep no other users from a unix socket on Windows: use 127.0.0.1:PORT, with insecure-loopback or TLS", b)
		}
		if !filepath.IsAbs(path) {
			return fmt.Errorf("%q: a unix socket has an absolute path, as in unix:///run/pilot/keyprovider.sock", b)
		}
	} else if strings.Contains(string(b), "://") {
		return fmt.Errorf("%q is neither unix:///PATH nor HOST:PORT", b)
	} else if _, port, err := net.SplitHostPort(string(b)); err != nil {
		return fmt.Errorf("%q is neither unix:///PATH nor HOST:PORT", b)
	} else if n, err := strconv.Atoi(port); err != nil || n < 0 || n > 65535 {
		return errors.New("the port is not a number from 0 to 65535")
	}
	*a = v
	return nil
}

// unix returns the path of a unix socket.
func (a address) unix() (path string, ok bool) {
	return strings.CutPrefix(string(a), "unix://")
}

// loopback reports whether only this machine can reach the address.
func (a address) loopback() bool {
	host, _, err := net.SplitHostPort(string(a))
	return err == nil && loopback.Is(host)
}

// unixAddress is a unix socket to listen on, as unix:///PATH, or off.
type unixAddress string

const off unixAddress = "off"

func (a *unixAddress) UnmarshalText(b []byte) error {
	v := unixAddress(b)
	if v != off && !filepath.IsAbs(v.path()) {
		return fmt.Errorf("%q is neither unix:///PATH nor off", b)
	}
	*a = v
	return nil
}

// path returns the path of the socket, or "" if the address is off or not set.
func (a unixAddress) path() string {
	path, ok := address(a).unix()
	if !ok {
		return ""
	}
	return path
}

// mirrorAddress is an address to listen on for TCP, as HOST:PORT, or off.
type mirrorAddress string

const mirrorOff mirrorAddress = "off"

func (a *mirrorAddress) UnmarshalText(b []byte) error {
	var tcp address
	if string(b) != string(mirrorOff) && (strings.Contains(string(b), "://") || tcp.UnmarshalText(b) != nil) {
		return fmt.Errorf("%q is neither HOST:PORT nor off", b)
	}
	*a = mirrorAddress(b)
	return nil
}

// socketPath is the absolute path of a socket. In text it may begin with unix://.
type socketPath string

func (p *socketPath) UnmarshalText(b []byte) error {
	path := strings.TrimPrefix(string(b), "unix://")
	if !filepath.IsAbs(path) {
		return fmt.Errorf("%q is not the absolute path of a socket", b)
	}
	*p = socketPath(path)
	return nil
}
