package doctor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/transfer/archive"
	"github.com/containerd/containerd/v2/core/transfer/image"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	keyproviderconfig "github.com/containers/ocicrypt/config/keyprovider-config"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/ctrlplane/pilot/internal/payload"
	"github.com/ctrlplane/pilot/processor"
)

const (
	// scratchNamespace is the containerd namespace that the doctor works in.
	scratchNamespace = "pilot-doctor"
	// scratchTTL is when containerd's garbage collector may remove its content if the
	// doctor is killed.
	scratchTTL     = 2 * time.Minute
	cleanUpTimeout = 10 * time.Second
	// finishTimeout bounds how long an interrupted doctor lets containerd finish its
	// work.
	finishTimeout = 10 * time.Second
)

// unpackLayer unpacks an encrypted layer into a snapshot, as CRI does with
// use_local_image_pull.
func (e *examination) unpackLayer(ctx context.Context) Step {
	if e.withDiffer() && !e.builtIn && e.broken[StepDiffer] {
		return needs(StepDiffer)
	}
	if err := processor.CheckScheme("jwe"); e.kek == "" && err != nil {
		return skipped("needs a KEK: name one with --kek that this node may wrap with; without one, the layer would be wrapped for a key of its own, and " + err.Error())
	}
	layer, err := newTestLayer(ctx, e.ProviderNames[0], e.Listen, e.kek)
	if err != nil {
		return failed(err.Error(), "journalctl -u pilot.service -n 30")
	}
	err = e.inScratch(ctx, func(ctx context.Context) error { return e.unpack(ctx, layer) })
	if err != nil {
		return e.notUnpacked(err)
	}
	wrapped := "its own key"
	if e.kek != "" {
		wrapped = fmt.Sprintf("KEK %q", e.kek)
	}
	return passed(fmt.Sprintf("a layer encrypted for %s was unpacked into %s and read", wrapped, e.snapshotter()))
}

// unpack unpacks the layer, and reads its file from the snapshot.
func (e *examination) unpack(ctx context.Context, l *testLayer) error {
	if err := content.WriteBlob(ctx, e.client.ContentStore(), "pilot-doctor-"+l.desc.Digest.String(), bytes.NewReader(l.blob), l.desc); err != nil {
		return err
	}
	snapshots := e.client.SnapshotService(e.snapshotter())
	key := "pilot-doctor-" + string(l.secret)
	mounts, err := snapshots.Prepare(ctx, key, "")
	if err != nil {
		return fmt.Errorf("snapshotter %s: %w", e.snapshotter(), err)
	}
	var opts []diff.ApplyOpt
	if !e.withDiffer() || e.kek == "" {
		opts = append(opts, payload.With(l.keys))
	}
	applied, err := e.client.DiffService().Apply(ctx, l.desc, mounts, opts...)
	if err != nil {
		return err
	}
	if applied.Digest != l.diffID {
		return fmt.Errorf("the unpacked layer has the diff ID %s, not %s", applied.Digest, l.diffID)
	}
	if err := snapshots.Commit(ctx, key+"-unpacked", key); err != nil {
		return fmt.Errorf("snapshotter %s: %w", e.snapshotter(), err)
	}
	if mounts, err = snapshots.View(ctx, key, key+"-unpacked"); err != nil {
		return fmt.Errorf("snapshotter %s: %w", e.snapshotter(), err)
	}
	return mount.WithReadonlyTempMount(ctx, mounts, func(root string) error {
		b, err := os.ReadFile(filepath.Join(root, testFile))
		if err == nil && !bytes.Equal(b, l.secret) {
			err = errors.New("the file in the snapshot is not the one that was encrypted")
		}
		return err
	})
}

// transfer makes containerd's transfer service import and unpack an encrypted image, as it
// does for CRI and ctr.
func (e *examination) transfer(ctx context.Context) Step {
	switch {
	case !e.running.HasTransfer():
		return skipped("only containerd 2.0 and later unpack the kubelet's images with the transfer service")
	case !e.withDiffer():
		return skipped("diff-listen is off, and the transfer service decrypts with pilot's differ only")
	case !e.builtIn && e.broken[StepDiffer]:
		return needs(StepDiffer)
	}
	if step, none := e.withoutKEK(); none {
		return step
	}
	layer, err := newTestLayer(ctx, e.ProviderNames[0], e.Listen, e.kek)
	if err != nil {
		return failed(err.Error(), "journalctl -u pilot.service -n 30")
	}
	err = e.inScratch(ctx, func(ctx context.Context) error { return e.importImage(ctx, layer) })
	if err != nil {
		return e.notUnpacked(err)
	}
	return passed(fmt.Sprintf("an image encrypted for KEK %q was imported and unpacked into %s", e.kek, e.snapshotter()))
}

// withoutKEK returns the skipped step of a check that needs a KEK, if there is none.
func (e *examination) withoutKEK() (step Step, none bool) {
	switch {
	case e.ListenTLS:
		return skipped("needs a KEK, and the key provider at " + e.Listen + " requires a client certificate"), true
	case e.kek == "" && e.broken[StepBroker]:
		return needs(StepBroker), true
	case e.kek == "":
		return skipped("needs a KEK: name one with --kek that this node may wrap with"), true
	}
	return Step{}, false
}

// importImage imports and unpacks an image of the layer, and removes it.
func (e *examination) importImage(ctx context.Context, l *testLayer) error {
	b, err := l.archive()
	if err != nil {
		return err
	}
	name := "pilot-doctor.invalid/" + string(l.secret) + ":latest"
	err = e.client.Transfer(ctx,
		archive.NewImageImportStream(bytes.NewReader(b), ""),
		image.NewStore(name, image.WithUnpack(platforms.DefaultSpec(), e.snapshotter())))
	if err != nil {
		return err
	}
	_, unpacked := e.client.SnapshotService(e.snapshotter()).Stat(ctx, identity.ChainID([]digest.Digest{l.diffID}).String())
	if errdefs.IsNotFound(unpacked) {
		unpacked = errNoUnpackConfig
	}
	return errors.Join(unpacked, e.client.ImageService().Delete(ctx, name, images.SynchronousDelete()))
}

// notUnpacked returns the step for a layer that did not become a snapshot.
func (e *examination) notUnpacked(err error) Step {
	switch reasonOf(err) {
	case pilotNotAsked:
		return failed(fmt.Sprintf("containerd did not ask pilot, though %s is correct%s: %s", e.running.Config, note(e.olderThan()), err), e.restartContainerd())
	case providerNotConfigured:
		return failed(err.Error(), reinstall...)
	}
	return failed(err.Error(), "journalctl -u "+e.running.Service+" -u pilot.service -n 30")
}

// errNoUnpackConfig is the error of a transfer service that imports an image and
// does not unpack it.
var errNoUnpackConfig = errors.New("the transfer service imported the image without unpacking it")

// reason is why containerd unpacked no layer, as far as the fix depends on it.
type reason int

const (
	otherReason           reason = iota
	pilotNotAsked                // containerd asked another differ or stream processor, or none
	providerNotConfigured        // pilot-decoder found no key provider pilot
)

// reasonOf returns why containerd unpacked no layer.
//
// It is the one place here that reads containerd's message. containerd 1.6 to 2.4 reports
// both as an unknown error without details: [diff.ErrNoProcessor] belongs to no class of
// errdefs, and what a stream processor prints is in the message only.
// TestDoctorRestart and TestDoctorExaminesStreamProcessors compare with containerd 1.6, 1.7 and 2.
func reasonOf(err error) reason {
	if errors.Is(err, errNoUnpackConfig) {
		return pilotNotAsked
	}
	if !errdefs.IsUnknown(err) {
		return otherReason
	}
	message := err.Error()
	switch {
	// imgcrypt's ctd-decoder is in containerd's default configuration.
	case strings.Contains(message, diff.ErrNoProcessor.Error()), strings.Contains(message, "ctd-decoder"):
		return pilotNotAsked
	case strings.Contains(message, keyproviderconfig.ENVVARNAME):
		return providerNotConfigured
	}
	return otherReason
}

// inScratch calls f with a namespace and a lease of its own, and removes what f makes
// there, whether f succeeds or not. f must not make anything that containerd's garbage
// collector can't remove.
func (e *examination) inScratch(ctx context.Context, f func(context.Context) error) (err error) {
	release, err := e.alone(ctx)
	if err != nil {
		return err
	}
	defer release()
	ctx = namespaces.WithNamespace(ctx, scratchNamespace)
	lease, err := e.newLease(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if left := e.cleanUp(ctx, lease); left != nil {
			err = errors.Join(err, fmt.Errorf("namespace %s could not be removed: %w (containerd's garbage collector empties it later)", scratchNamespace, left))
		}
	}()
	ctx, stop := finishing(ctx)
	defer stop()
	return f(leases.WithLease(ctx, lease.ID))
}

// finishing returns a context for work in the scratch namespace. It has ctx's deadline,
// and is canceled [finishTimeout] after ctx is.
//
// A canceled call continues in containerd for a moment. If garbage is collected meanwhile,
// a layer may still be written to the directory of a snapshot or an ingest that is being
// removed. That leaves a directory that containerd does not know of, and removes with the
// next snapshot or never.
func finishing(ctx context.Context) (context.Context, context.CancelFunc) {
	deadline, _ := ctx.Deadline() // each step has one
	work, cancel := context.WithDeadline(context.WithoutCancel(ctx), deadline)
	stop := context.AfterFunc(ctx, func() {
		select {
		case <-time.After(finishTimeout):
			cancel()
		case <-work.Done():
		}
	})
	return work, func() { stop(); cancel() }
}

// alone waits until no other doctor uses the scratch namespace.
func (e *examination) alone(ctx context.Context) (release func(), err error) {
	dir, err := os.Open(filepath.Dir(e.Containerd))
	if err != nil {
		return nil, err
	}
	for syscall.Flock(int(dir.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			dir.Close()
			return nil, fmt.Errorf("another doctor is running: %w", ctx.Err())
		}
	}
	return func() { dir.Close() }, nil
}

// newLease makes the namespace and a lease in it, even if ctx is done: a canceled call
// might still make a lease, whose ID would be unknown here.
func (e *examination) newLease(ctx context.Context) (leases.Lease, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUpTimeout)
	defer cancel()
	if err := e.client.NamespaceService().Create(ctx, scratchNamespace, nil); err != nil && !errdefs.IsAlreadyExists(err) {
		return leases.Lease{}, err
	}
	return e.client.LeasesService().Create(ctx, leases.WithRandomID(), leases.WithExpiration(scratchTTL))
}

// cleanUp removes the lease with its content, and the namespace.
func (e *examination) cleanUp(ctx context.Context, lease leases.Lease) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUpTimeout)
	defer cancel()
	if err := e.client.LeasesService().Delete(ctx, lease, leases.SynchronousDelete); err != nil {
		return err
	}
	others, err := e.client.LeasesService().List(ctx)
	if err != nil || len(others) > 0 {
		return err // a doctor was killed just now: its lease expires
	}
	// A doctor that was killed may have left an image, which no lease protects.
	left, err := e.client.ImageService().List(ctx)
	if err != nil {
		return err
	}
	for _, img := range left {
		if err := e.client.ImageService().Delete(ctx, img.Name, images.SynchronousDelete()); err != nil {
			return err
		}
	}
	return e.client.NamespaceService().Delete(ctx, scratchNamespace)
}
