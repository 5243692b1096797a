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
)

const (
	// scratchNamespace is containerd's namespace for what is made to try.
	scratchNamespace = "pilot-doctor"
	// scratchExpires is when containerd's garbage collector may remove that,
	// if the doctor is killed.
	scratchExpires = 2 * time.Minute
	cleanUpWithin  = 10 * time.Second
	// finishTimeout bounds how long an interrupted doctor lets containerd
	// finish what it makes.
	finishTimeout = 10 * time.Second
)

// unpackLayer unpacks an encrypted layer into a snapshot, as CRI does where it
// pulls by itself.
func (e *examination) unpackLayer(ctx context.Context) Step {
	if e.withDiffer() && !e.builtIn && e.broken[StepDiffer] {
		return needs(StepDiffer)
	}
	layer, err := newTestLayer(ctx, e.ProviderNames[0], e.Listen, e.kek)
	if err != nil {
		return failed(err.Error(), "journalctl -u pilot.service -n 30")
	}
	err = e.inScratch(ctx, func(ctx context.Context) error { return e.unpack(ctx, layer) })
	if err != nil {
		return e.notUnpacked(err)
	}
	wrapped := "a key of its own"
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
		return fmt.Errorf("the layer was unpacked as %s, and is %s", applied.Digest, l.diffID)
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

// transfer has containerd's transfer service import and unpack an encrypted
// image, as it does for CRI and ctr.
func (e *examination) transfer(ctx context.Context) Step {
	switch {
	case !e.running.HasTransfer():
		return skipped("the transfer service unpacks with pilot from containerd 2.0 on; the kubelet pulls without it before")
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

// withoutKEK returns the step of one that wraps for a KEK, if there is none to wrap
// for.
func (e *examination) withoutKEK() (step Step, none bool) {
	switch {
	case e.ListenTLS:
		return skipped("it takes a KEK, and " + e.Listen + " wraps for clients with a certificate only"), true
	case e.kek == "" && e.broken[StepBroker]:
		return needs(StepBroker), true
	case e.kek == "":
		return skipped("it takes a KEK: name one that this node uses with --kek"), true
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

// notUnpacked is the step of a layer that did not become a snapshot.
func (e *examination) notUnpacked(err error) Step {
	switch reasonOf(err) {
	case pilotNotAsked:
		return failed(fmt.Sprintf("containerd did not ask pilot, though %s is right%s: %s", e.running.Config, note(e.olderThan()), err), e.restartContainerd())
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
// TestDoctorRestart and TestDoctorProcessors compare with containerd 1.6, 1.7 and 2.
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

// inScratch has f work in a namespace of its own, and removes what it makes
// there, whether it succeeds or not. Nothing of it may need to be removed
// otherwise than by containerd's garbage collector.
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
			err = errors.Join(err, fmt.Errorf("namespace %s is not removed: %w (containerd's garbage collector empties it later)", scratchNamespace, left))
		}
	}()
	ctx, stop := finishing(ctx)
	defer stop()
	return f(leases.WithLease(ctx, lease.ID))
}

// finishing returns a context for what is made in the scratch namespace. It has
// ctx's deadline, and is canceled [finishTimeout] after ctx is.
//
// A canceled call goes on in containerd for a moment. If its garbage is collected
// meanwhile, a layer may still be written into a snapshot's or an ingest's
// directory while that is removed: a directory stays that containerd no longer
// knows of, which it removes with the next snapshot that goes, or never.
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

// alone waits until no other doctor has the scratch namespace.
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
			return nil, fmt.Errorf("another doctor is at work: %w", ctx.Err())
		}
	}
	return func() { dir.Close() }, nil
}

// newLease makes a namespace and a lease in it. It does so even if ctx is done,
// lest one is made that is not known here.
func (e *examination) newLease(ctx context.Context) (leases.Lease, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUpWithin)
	defer cancel()
	if err := e.client.NamespaceService().Create(ctx, scratchNamespace, nil); err != nil && !errdefs.IsAlreadyExists(err) {
		return leases.Lease{}, err
	}
	return e.client.LeasesService().Create(ctx, leases.WithRandomID(), leases.WithExpiration(scratchExpires))
}

// cleanUp removes the lease, what it holds, and the namespace.
func (e *examination) cleanUp(ctx context.Context, lease leases.Lease) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUpWithin)
	defer cancel()
	if err := e.client.LeasesService().Delete(ctx, lease, leases.SynchronousDelete); err != nil {
		return err
	}
	others, err := e.client.LeasesService().List(ctx)
	if err != nil || len(others) > 0 {
		return err // of a doctor that was killed just now: they expire
	}
	// A doctor that was killed may have left an image, which no lease holds.
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
