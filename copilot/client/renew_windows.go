package client

// writable returns no error: whether files can be replaced is seen when they are.
func writable(...string) error { return nil }
