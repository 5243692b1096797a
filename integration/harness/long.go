package harness

import "testing"

// Long skips a test that takes long, unless all tests are wanted: make test runs without such
// tests, make test-all with them. So do subtests of combinations, such as of formats and
// versions, where others have each of both.
func Long(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("long: make test-all")
	}
}
