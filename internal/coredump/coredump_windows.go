package coredump

func disable() error { return nil }
