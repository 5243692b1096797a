package main

import (
	"fmt"
	"strconv"
	"time"

	"github.com/ctrlplane/pilot/keyprovider/brokerconfig"
)

// originalDefaults sets conf to the defaults of the original pilot, changed by its
// variables, which getenv reads: port 50051, a broker at
// http://localhost:8080/api/v1/key, and a KEK kept for 10 seconds after its last use.
// The original served the whole network in plain text; this serves its own machine
// only.
func originalDefaults(conf *configuration, getenv func(string) string) error {
	variable := func(name, unset string) string {
		if v := getenv(name); v != "" {
			return v
		}
		return unset
	}
	if err := conf.Listen.UnmarshalText([]byte("127.0.0.1:" + variable("GRPC_PORT", "50051"))); err != nil {
		return fmt.Errorf("GRPC_PORT: %w", err)
	}
	conf.InsecureLoopback = true
	conf.DiffListen = off
	conf.Broker = brokerconfig.URLs{variable("KEYREQUEST_BASEURL", "http://localhost:8080/api/v1/key")}
	conf.AnnotationFormat = "original"
	conf.KEKCacheTTL = 0

	timeout := variable("KEYREQUEST_CACHE_TIMEOUT", "10")
	n, err := strconv.ParseInt(timeout, 10, 32)
	if err != nil || n < 0 {
		return fmt.Errorf("KEYREQUEST_CACHE_TIMEOUT: %q is not a number of 0 or more", timeout)
	}
	units := variable("KEYREQUEST_CACHE_UNITS", "SECONDS")
	unit, ok := javaTimeUnits[units]
	if !ok {
		return fmt.Errorf("KEYREQUEST_CACHE_UNITS: %q is not a time unit such as SECONDS or MINUTES", units)
	}
	conf.KEKCacheIdle = time.Duration(n) * unit
	if n == 0 {
		conf.KEKCacheSize = 0 // expires at once
	}
	return nil
}

// javaTimeUnits are the names of java.util.concurrent.TimeUnit.
var javaTimeUnits = map[string]time.Duration{
	"NANOSECONDS":  time.Nanosecond,
	"MICROSECONDS": time.Microsecond,
	"MILLISECONDS": time.Millisecond,
	"SECONDS":      time.Second,
	"MINUTES":      time.Minute,
	"HOURS":        time.Hour,
	"DAYS":         24 * time.Hour,
}
