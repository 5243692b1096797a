package harness

import "testing"

// Long skips a test that takes long, unless all tests are wanted: make test runs without such
// tests, make test-all with them.
func Long(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("long: make test-all")
	}
}
