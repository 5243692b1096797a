package doctor

import (
	"context"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// chain is the name of the snapshot that the snapshotter has.
const chain = "sha256:3333333333333333333333333333333333333333333333333333333333333333"

// mountedSnapshot is a snapshotter with the mounted layer of an image.
type mountedSnapshot struct {
	snapshotsapi.UnimplementedSnapshotsServer
}

const otherLayer = "sha256:4444444444444444444444444444444444444444444444444444444444444444"

func (mountedSnapshot) Stat(_ context.Context, r *snapshotsapi.StatSnapshotRequest) (*snapshotsapi.StatSnapshotResponse, error) {
	if r.Key != chain {
		return nil, status.Error(codes.NotFound, "not found")
	}
	return &snapshotsapi.StatSnapshotResponse{Info: &snapshotsapi.Info{Labels: map[string]string{
		"containerd.io/snapshot.ref":               chain,
		"containerd.io/snapshot/cri.image-ref":     "registry.test/dev/app:1",
		"containerd.io/snapshot/cri.layer-digest":  otherLayer,
		"containerd.io/snapshot/stargz/toc.digest": "sha256:toc",
		"containerd.io/snapshot/remote":            "remote snapshot",
	}}}, nil
}

// TestDoctorAsksPilotAboutMountedLayers has a layer that was mounted for another image, which
// pilot refuses, and allows.
func TestDoctorAsksPilotAboutMountedLayers(t *testing.T) {
	dir := t.TempDir()
	listen := func(name string) net.Listener {
		t.Helper()
		l, err := net.Listen("unix", filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	s := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(s, mountedSnapshot{})
	go s.Serve(listen("snapshotter.sock"))
	t.Cleanup(s.Stop)
	refuses, asked := false, ""
	pilot := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = r.Header.Get("Range") + " " + r.URL.Path + " " + r.URL.Query().Encode()
		if refuses {
			w.WriteHeader(http.StatusNotFound)
			w.Write([]byte(`{"errors":[{"message":"KEK \"team-a\": not allowed"}]}`))
			return
		}
		w.WriteHeader(http.StatusPartialContent)
	})}
	go pilot.Serve(listen("lazy.sock"))
	t.Cleanup(func() { pilot.Close() })

	e := examination{Doctor: &Doctor{Lazy: filepath.Join(dir, "lazy.sock"), LazySnapshotter: filepath.Join(dir, "snapshotter.sock")}}
	step := e.mounted(t.Context(), "sha256:layer", chain)
	if step.Result != OK || !strings.Contains(step.Detail, "sha256:layer is mounted, and was not pulled") {
		t.Errorf("allowed: %+v", step)
	}
	const want = "bytes=0-1 /lazy/v2/dev/app/blobs/" + otherLayer + " for=container&ns=registry.test&snapshot=sha256%3A3333333333333333333333333333333333333333333333333333333333333333&toc=sha256%3Atoc"
	if asked != want {
		t.Errorf("pilot was asked %s, not %s", asked, want)
	}
	refuses = true
	step = e.mounted(t.Context(), "sha256:layer", chain)
	if step.Result != Failed || !strings.Contains(step.Detail, `no container of it starts: pilot says of registry.test/dev/app: KEK "team-a": not allowed`) {
		t.Errorf("refused: %+v", step)
	}
	for what, broken := range map[string]Doctor{
		"without lazy-listen":   {LazySnapshotter: e.LazySnapshotter},
		"without pilot":         {Lazy: filepath.Join(dir, "away.sock"), LazySnapshotter: e.LazySnapshotter},
		"without a snapshotter": {Lazy: e.Lazy, LazySnapshotter: filepath.Join(dir, "away.sock")},
	} {
		e := examination{Doctor: &broken}
		if step := e.mounted(t.Context(), "sha256:layer", chain); step.Result != Failed || !strings.Contains(step.Detail, "no container of it starts") || len(step.Fix) == 0 {
			t.Errorf("%s: %+v", what, step)
		}
	}
}
