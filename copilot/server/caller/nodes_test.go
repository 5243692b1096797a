package caller

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// TestNodesAddressesAreAskedForAgain has nodes move, go and come while their API server
// answers or not.
func TestNodesAddressesAreAskedForAgain(t *testing.T) {
	addresses, status, calls := "192.0.2.7", http.StatusOK, 0
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		calls++
		w.WriteHeader(status)
		fmt.Fprintf(w, `{"status":{"addresses":[{"address":%q}]}}`, addresses)
	}))
	defer api.Close()
	n := &nodes{url: api.URL, client: api.Client()}
	check := func(address, want string, wantCalls int) {
		t.Helper()
		before := calls
		err := n.check(t.Context(), "worker-7", address+":41022")
		if got := fmt.Sprint(err); want == "" && err != nil || !strings.Contains(got, want) || calls-before != wantCalls {
			t.Errorf("from %s: %v after %d calls, want %q after %d", address, err, calls-before, want, wantCalls)
		}
	}
	// later lets time pass for what is known of the node.
	later := func(d time.Duration) {
		a := n.known["worker-7"]
		a.at, a.due = a.at.Add(-d), a.due.Add(-d)
	}
	const another = "is not one of its addresses"
	check("192.0.2.7", "", 1)
	check("192.0.2.7", "", 0)
	check("[::ffff:192.0.2.7]", "", 0)
	check("192.0.2.8", another, 0)
	addresses = "192.0.2.8"
	later(nodeRetry)
	check("192.0.2.7", "", 0)
	check("192.0.2.8", "", 1)
	check("192.0.2.7", another, 0)
	// The API server is away: what is known counts, and it is not asked for each request.
	status = http.StatusServiceUnavailable
	later(nodeTTL)
	check("192.0.2.8", "", 1)
	check("192.0.2.8", "", 0)
	check("192.0.2.7", another, 0)
	status = http.StatusNotFound
	later(nodeTTL)
	check("192.0.2.8", errNoNode.Error(), 1)
	check("192.0.2.8", errNoNode.Error(), 0)
	status = http.StatusServiceUnavailable
	later(nodeTTL)
	check("192.0.2.8", ErrNodes.Error(), 1)
	if err := n.check(t.Context(), "worker-7", "192.0.2.8:1"); !errors.Is(err, ErrNodes) {
		t.Error(err)
	}
	status = http.StatusOK
	later(nodeRetry)
	check("192.0.2.8", "", 1)
	check("@", "", 0) // a unix socket
}
