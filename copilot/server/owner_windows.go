package server

// checkOwner does nothing: a store is opened on Linux only.
func checkOwner(string) error { return nil }
