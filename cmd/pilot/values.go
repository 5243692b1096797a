package main

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/ctrlplane/pilot/internal/loopback"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// urls are URLs, separated by commas in text.
type urls []string

func (u *urls) String() string { return strings.Join(*u, ",") }

func (u *urls) UnmarshalText(b []byte) error {
	return split((*[]string)(u), b, func(url string, _ []string) error {
		if url == "" {
			return errors.New("a URL is empty")
		}
		return nil
	})
}

// providerNames are names of a key provider, separated by commas in text.
type providerNames []string

func (n *providerNames) String() string { return strings.Join(*n, ",") }

func (n *providerNames) UnmarshalText(b []byte) error {
	return split((*[]string)(n), b, func(name string, before []string) error {
		switch {
		case name == "":
			return errors.New("a name is empty")
		case strings.ContainsAny(name, ": "):
			return fmt.Errorf("%.60q can't be the name of a key provider: it has a colon or a space", name)
		case slices.Contains(before, name):
			return fmt.Errorf("duplicate name %q", name)
		}
		return nil
	})
}

// kekIDs are the ids of KEKs, separated by commas in text.
type kekIDs []string

func (k *kekIDs) String() string { return strings.Join(*k, ",") }

func (k *kekIDs) UnmarshalText(b []byte) error {
	return split((*[]string)(k), b, func(id string, _ []string) error { return wireformat.ValidateKEKID(id) })
}

// registryPatterns are patterns of registries, separated by commas in text.
type registryPatterns []string

func (r *registryPatterns) String() string { return strings.Join(*r, ",") }

func (r *registryPatterns) UnmarshalText(b []byte) error {
	return split((*[]string)(r), b, func(pattern string, _ []string) error {
		if !registryPattern.MatchString(pattern) {
			return fmt.Errorf("%.80q is neither a registry nor a pattern of some, as in *.example.com", pattern)
		}
		return nil
	})
}

var registryPattern = regexp.MustCompile(`^[A-Za-z0-9.*:_\[\]-]+$`)

// split sets list to the words of text, which are separated by commas. check gets
// each word and those before it.
func split(list *[]string, text []byte, check func(word string, before []string) error) error {
	*list = nil
	for word := range strings.SplitSeq(string(text), ",") {
		word = strings.TrimSpace(word)
		if err := check(word, *list); err != nil {
			return err
		}
		*list = append(*list, word)
	}
	return nil
}

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

// tokenSource is where a token for the broker comes from: github-actions or env:NAME.
type tokenSource string

const gitHubActions tokenSource = "github-actions"

// variableName matches the names of environment variables.
var variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

func (s *tokenSource) UnmarshalText(b []byte) error {
	v := tokenSource(b)
	if v != gitHubActions && !variableName.MatchString(v.variable()) {
		// It may be a token itself, which must not be repeated.
		return errors.New("it is neither github-actions nor env:NAME with the name of a variable, as in env:COPILOT_TOKEN")
	}
	*s = v
	return nil
}

// variable returns the name of the environment variable, or "".
func (s tokenSource) variable() string {
	name, ok := strings.CutPrefix(string(s), "env:")
	if !ok {
		return ""
	}
	return name
}
