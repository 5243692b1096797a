package server

import (
	"fmt"
	"net"
	"net/http"
	"strings"

	"github.com/ctrlplane/pilot/copilot/server/auditing"
	"github.com/ctrlplane/pilot/internal/loopback"
)

// forLoopback returns h for requests whose Host is this machine, and that no browser
// sends for a foreign web page. Otherwise a page could fetch KEKs by giving its own name
// the address 127.0.0.1, or use them without seeing the answers.
func forLoopback(h http.Handler, b *broker) http.Handler {
	a := &api{b, false}
	other := a.chain(route{action: "other", handle: func(r *http.Request, _ *auditing.Entry) (any, error) {
		return nil, fmt.Errorf("%w, %.80q", errHost, r.Host)
	}})
	foreign := a.chain(route{action: "other", handle: func(r *http.Request, _ *auditing.Entry) (any, error) {
		return nil, fmt.Errorf("%w (Origin %.80q, Sec-Fetch-Site %.20q)", errWebPage, r.Header.Get("Origin"), r.Header.Get("Sec-Fetch-Site"))
	}})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, err := net.SplitHostPort(r.Host)
		if err != nil {
			host = strings.Trim(r.Host, "[]")
		}
		if !loopback.Is(host) {
			other.ServeHTTP(w, r)
			return
		}
		if fromWebPage(r) {
			foreign.ServeHTTP(w, r)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// fromWebPage reports whether a browser sent the request for a foreign page. copilot has
// no pages of its own.
func fromWebPage(r *http.Request) bool {
	origin := r.Header.Values("Origin")
	site := r.Header.Get("Sec-Fetch-Site")
	return len(origin) > 0 && !(len(origin) == 1 && origin[0] == "http://"+r.Host) || site != "" && site != "none" && site != "same-origin"
}
