package ocicryptclient

import "testing"

func TestTargets(t *testing.T) {
	for target, want := range map[string]string{
		"unix:relative/s":       "unix relative/s localhost",
		"unix:///dir/s%20p":     "unix /dir/s p localhost",
		"unix-abstract:///name": "unix @/name localhost",
		"DNS:///example.com:1":  "tcp example.com:1 example.com",
		"dns:/example.com:1":    "tcp example.com:1 example.com",
		"dns:///example.com":    "tcp example.com:443 example.com",
		":50051":                "tcp localhost:50051 localhost",
		"[::1]:50051":           "tcp [::1]:50051 ::1",
		"localhost:50051":       "tcp localhost:50051 localhost",
		"dns://8.8.8.8/a:1":     `grpc "dns://8.8.8.8/a:1": an authority (8.8.8.8) is not supported: use dns:///a:1`,
		"unix://run/s":          `grpc "unix://run/s": an authority (run) is not supported: use unix:///s`,
		"unix:":                 `grpc "unix:" has no address`,
		"example.com":           `grpc "example.com" is not unix:///PATH or HOST:PORT`,
	} {
		var got string
		if s, err := newServer(target, nil); err != nil {
			got = err.Error()
		} else {
			got = s.Network + " " + s.Address + " " + s.host
		}
		if got != want {
			t.Errorf("%s: %s, want %s", target, got, want)
		}
	}
}
