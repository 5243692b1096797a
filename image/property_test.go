package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"

	"github.com/ctrlplane/pilot/image/imagetest"
	"github.com/ctrlplane/pilot/processor"
)

// TestProperty encrypts random images for random recipients and checks that
// nothing is readable but what [Encrypt] reports, that every recipient opens
// what was encrypted, that decrypting gives the original back, and that other
// implementations agree.
//
// PILOT_IMAGES is how many images, 100 if it is not set. PILOT_SEED is the seed
// of the first, or the ID of one image, as a failure prints it. Without it, the
// images that failed before are checked too.
func TestProperty(t *testing.T) {
	count, first := 100, uint64(1)
	var only int
	level := logrus.GetLevel()
	logrus.SetLevel(logrus.WarnLevel)
	t.Cleanup(func() { logrus.SetLevel(level) })
	if text := os.Getenv("PILOT_IMAGES"); text != "" {
		var err error
		if count, err = strconv.Atoi(text); err != nil {
			t.Fatalf("PILOT_IMAGES: %v", err)
		}
	}
	if text := os.Getenv("PILOT_SEED"); text != "" {
		var err error
		if first, only, err = imagetest.Parse(text); err != nil {
			t.Fatalf("PILOT_SEED: %v", err)
		}
	}
	p := newProperties(t)
	if os.Getenv("PILOT_SEED") == "" {
		for _, id := range failedBefore {
			seed, size, err := imagetest.Parse(id)
			if err != nil {
				t.Fatal(err)
			}
			for _, problem := range p.check(seed, size) {
				t.Errorf("PILOT_SEED=%s: %s", id, problem)
			}
		}
	}
	if only > 0 {
		t.Log(imagetest.New(first, only))
		for _, problem := range p.check(first, only) {
			t.Error(problem)
		}
		return
	}
	classes := make(map[string][]string)
	for n := range count {
		seed, size := first+uint64(n), 1+n*maxSize/count
		for _, problem := range p.check(seed, size) {
			class, _, _ := strings.Cut(problem, ": ")
			if classes[class] = append(classes[class], fmt.Sprintf("PILOT_SEED=%d/%d", seed, size)); len(classes[class]) == 1 {
				t.Errorf("PILOT_SEED=%d/%d: %s", seed, size, problem)
			}
		}
	}
	for class, ids := range classes {
		t.Errorf("%d of %d images: %s (%s)", len(ids), count, class, strings.Join(ids[:min(len(ids), 5)], ", "))
	}
	t.Logf("%d images from seed %d: %d encrypted (%d only with AllowPlain), %d refused, %d with nothing to encrypt", count, first, p.encrypted, p.failedClosed, p.refused, p.nothing)
}

// failedBefore are the IDs of images that failed once. An ID stands for another
// image when imagetest changes: those that name a test have a case in it, too.
var failedBefore = []string{
	"1795860834/5", // TestEntriesComeBack
	"1795861155/4", // TestSubjectInSteps
	"1795860835/6", // an index with absent entries whose manifest has an encrypted subject elsewhere, in two steps
}

// maxSize is that of the largest images.
const maxSize = 7

// properties checks images in one store, each in a namespace of its own.
type properties struct {
	t          testing.TB
	db         *metadata.DB
	recipients *recipients

	encrypted, refused, nothing, failedClosed int
}

func newProperties(t testing.TB) *properties {
	t.Helper()
	dir := memoryDir(t)
	blobs, err := local.NewStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	db, err := bolt.Open(filepath.Join(dir, "meta.db"), 0o600, &bolt.Options{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return &properties{t: t, db: metadata.NewDB(db, blobs, nil), recipients: newRecipients(t)}
}

// memoryDir returns a directory in memory, if the machine has one: the content
// store syncs every blob to the disk, which takes longer than all else together.
func memoryDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "pilot-property-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// trial is one image being checked.
type trial struct {
	*properties
	*imagetest.Image
	s        *store
	rng      *rand.Rand
	to       []recipient
	plain    map[digest.Digest]digest.Digest // of encrypted layers, as their keys say
	opts     Options
	leftOut  map[digest.Digest]bool
	problems []string
}

func (c *trial) problem(class, format string, args ...any) {
	c.problems = append(c.problems, class+": "+fmt.Sprintf(format, args...))
}

// check makes an image and returns what is wrong with what becomes of it, each
// with a class of problems before a colon.
func (p *properties) check(seed uint64, size int) (problems []string) {
	c := &trial{plain: make(map[digest.Digest]digest.Digest), leftOut: make(map[digest.Digest]bool), properties: p, Image: imagetest.New(seed, size), rng: rand.New(rand.NewPCG(seed, 0))}
	ctx := namespaces.WithNamespace(p.t.Context(), "n"+strings.ReplaceAll(c.ID, "/", "-"))
	c.s = &store{Store: p.db.ContentStore(), t: p.t, ctx: ctx}
	defer func() {
		if r := recover(); r != nil {
			problems = append(c.problems, fmt.Sprintf("panic: %v\n%s", r, debug.Stack()))
		}
		p.collect(ctx)
	}()
	if err := c.Write(ctx, c.s); err != nil {
		p.t.Fatal(err)
	}
	if c.Blobs[c.Target.Digest].Absent {
		return nil
	}
	c.to = p.recipients.choose(c.rng)
	c.opts = c.options()
	c.run()
	return c.problems
}

// options selects all of most images.
func (c *trial) options() Options {
	opts := Options{AllowPlain: c.rng.IntN(2) == 0, KeepAbsent: c.rng.IntN(4) == 0}
	switch c.rng.IntN(12) {
	case 0:
		opts.Layers = []int{c.rng.IntN(3) - 1}
	case 1:
		opts.Platforms = []ocispec.Platform{{OS: "linux", Architecture: "amd64"}}
	case 2:
		opts.Attestations = DropAttestations
	case 3:
		opts.Attestations = KeepAttestations
	}
	return opts
}

func (c *trial) run() {
	before := c.s.blobs()
	result, err := Encrypt(c.s.ctx, c.s, c.Target, encryptConfig(c.to), c.opts)
	var plain *PlainError
	if errors.As(err, &plain) {
		c.failedClosed++
		if c.opts.AllowPlain || c.s.blobs() != before || len(plain.Plain) == 0 {
			c.problem("an image that may stay plain is refused, or was written", "%d blobs, were %d: %v", c.s.blobs(), before, err)
		}
		c.opts.AllowPlain = true
		result, err = Encrypt(c.s.ctx, c.s, c.Target, encryptConfig(c.to), c.opts)
		for _, p := range plain.Plain {
			if !slices.ContainsFunc(result.Plain, func(q Plain) bool { return p.Digest == q.Digest && p.Manifest == q.Manifest && p.Reason == q.Reason }) && err == nil {
				c.problem("refused for what the report does not name", "%s", p)
			}
		}
	} else if left := Unaccepted(result.Plain); err == nil && !c.opts.AllowPlain && len(left) > 0 {
		c.problem("not accepted, and not refused", "%s", left[0])
	}
	switch {
	case err != nil:
		c.refused++
		c.checkRefusal(err)
		return
	case result.Layers == 0:
		c.nothing++
	default:
		c.encrypted++
	}
	e := exported(c.s, result.Target)
	c.checkReadable(e, result)
	c.checkRecipients(e)
	c.checkPeers(e, result)
	c.checkRewrap(result.Target)
	c.checkLike(result)

	// What the user keeps is the encrypted image alone.
	c.keep("encrypted", result.Target)
	c.collect(c.s.ctx)
	c.checkDecrypt("decrypt", result.Target, decryptConfig(c.to))
	if c.rng.IntN(3) == 0 {
		c.checkPartly(result.Target)
	}
	c.s.noIngests()
}

// checkLike encrypts the image once more, for others, with what was encrypted before as the
// earlier image.
func (c *trial) checkLike(before Result) {
	seed, _, err := imagetest.Parse(c.ID)
	if err != nil {
		c.t.Fatal(err)
	}
	again := *c
	again.rng = rand.New(rand.NewPCG(seed, 1))
	again.plain, again.problems = make(map[digest.Digest]digest.Digest), nil
	was := exported(c.s, before.Target)
	for again.to = c.recipients.choose(again.rng); len(again.to) > 32; {
		again.to = c.recipients.choose(again.rng)
	}
	to := encryptConfig(again.to)
	to.Keys = decryptConfig(c.to)
	opts := c.opts
	opts.Like = &Like{Layers: was.encrypted, Take: func(ctx context.Context, blob ocispec.Descriptor) error {
		_, err := c.s.Info(ctx, blob.Digest)
		return err
	}}
	result, err := Encrypt(c.s.ctx, c.s, c.Target, to, opts)
	if err != nil {
		c.problem("like an earlier image, it is refused", "%v", err)
		return
	}
	if result.Layers != before.Layers || result.Reused.Layers != result.Layers || len(result.Reused.Failed) > 0 {
		c.problem("like an earlier image, not all is taken over", "%d of %d layers, were %d: %v", result.Reused.Layers, result.Layers, before.Layers, result.Reused.Failed)
	}
	e := exported(c.s, result.Target)
	again.checkReadable(e, result)
	again.checkRecipients(e)
	again.checkDecrypt("decrypt what was taken over", result.Target, decryptConfig(again.to))
	for _, problem := range again.problems {
		c.problems = append(c.problems, "like an earlier image, "+problem)
	}
}

// keep gives an image a name, which keeps it from the garbage collector.
func (c *trial) keep(name string, target ocispec.Descriptor) {
	is := metadata.NewImageStore(c.db)
	if _, err := is.Create(c.s.ctx, images.Image{Name: name, Target: target}); err != nil {
		c.t.Fatal(err)
	}
}

// collect removes what no image needs.
func (p *properties) collect(ctx context.Context) {
	if _, err := p.db.GarbageCollect(context.WithoutCancel(ctx)); err != nil {
		p.t.Fatal(err)
	}
}

// checkRefusal checks that an image is refused only for a reason.
func (c *trial) checkRefusal(err error) {
	for _, reason := range []struct{ feature, text string }{
		{"absent layer", "is not here"},
		{"absent layer", "no layers of this image are here"},
		{"absent foreign layer", "is not here"}, // the same content, under another type
		{"absent foreign layer", "no layers of this image are here"},
		{"absent manifest", "no layers of this image are here"},
		{"unusual manifest type", "a Docker manifest has a mediaType"},
	} {
		if c.Features[reason.feature] && strings.Contains(err.Error(), reason.text) {
			return
		}
	}
	for _, text := range []string{"the image has no layer", "the image has no platform", "is not here"} {
		if len(c.opts.Layers)+len(c.opts.Platforms) > 0 && strings.Contains(err.Error(), text) {
			return
		}
	}
	if len(c.to) > 32 && errors.Is(err, processor.ErrTooManyRecipients) {
		return
	}
	c.problem("refused without a reason", "%v", err)
}

// named are the blobs that the report says are as they were, with all that they
// refer to where it says that this is not reported.
func (c *trial) named(result Result) map[digest.Digest]Reason {
	all := make(map[digest.Digest]Reason)
	var add func(d digest.Digest, reason Reason)
	add = func(d digest.Digest, reason Reason) {
		if all[d] != "" && all[d] != ReasonURLs || c.Blobs[d] == nil {
			return
		}
		all[d] = reason
		for _, child := range c.Blobs[d].Children {
			add(child.Digest, reason)
		}
	}
	for _, p := range result.Plain {
		switch p.Reason {
		case ReasonAbsent, ReasonNotImage:
			add(p.Digest, p.Reason)
		default:
			if all[p.Digest] == "" || all[p.Digest] == ReasonURLs {
				all[p.Digest] = p.Reason
			}
		}
	}
	return all
}

// checkReadable checks that what the report does not name can't be read, and that
// what it names can, if it is here.
func (c *trial) checkReadable(e *export, result Result) {
	named := c.named(result)
	for _, d := range c.Digests(imagetest.Content) {
		b := c.Blobs[d]
		readable, mentioned := e.holds(d, b.Marker), e.mentions(d)
		switch {
		case len(b.Bytes) == 0: // it is the same when it is encrypted
		case (named[d] == "" || named[d] == ReasonURLs) && readable:
			c.problem(fmt.Sprintf("readable and not named, %q", b.MediaType), "%s", d)
		case named[d] == "" && mentioned && !slices.ContainsFunc(result.LeftOut, func(left ocispec.Descriptor) bool { return left.Digest == d }): // that is noted
			c.problem(fmt.Sprintf("digest mentioned and not named, absent %v", b.Absent), "%s %s", b.MediaType, d)
		case named[d] != "" && named[d] != ReasonAbsent && named[d] != ReasonURLs && !readable && !mentioned:
			c.problem("named and not readable", "%s %s: %s", b.MediaType, d, named[d])
		}
	}
	for _, left := range result.LeftOut {
		if !c.Blobs[left.Digest].Absent && e.blobs[left.Digest] != nil && named[left.Digest] == "" {
			c.problem("left out, and there", "%s %s", left.MediaType, left.Digest)
		}
		c.leftOut[left.Digest] = true
	}
	for _, child := range e.encrypted {
		if len(e.blobs[child.Digest]) != int(child.Size) {
			c.problem("size", "%s has %d bytes, and its descriptor says %d", child.Digest, len(e.blobs[child.Digest]), child.Size)
		}
	}
}

// checkRecipients checks that each recipient alone unwraps each layer's key, and that
// nobody else does.
func (c *trial) checkRecipients(e *export) {
	for _, desc := range e.encrypted {
		var first digest.Digest
		for i, r := range c.to {
			key, err := r.opens(c.s.ctx, desc)
			if err != nil {
				c.problem(fmt.Sprintf("%s can't open it, of %s", r.scheme, many(len(c.to))), "layer %s, of %d recipients: %v", desc.Digest, len(c.to), err)
				return
			}
			if i > 0 && key.Digest != first || c.Blobs[key.Digest] == nil {
				c.problem("key of another layer", "%s holds that of %s", desc.Digest, key.Digest)
			}
			first = key.Digest
			c.plain[desc.Digest] = key.Digest
			key.Clear()
		}
		if slices.ContainsFunc(c.to, func(r recipient) bool { return r.kek != "" }) {
			continue // pilot's key provider is at everybody's service here
		}
		if _, err := (recipient{scheme: "jwe", dc: c.recipients.stranger.Private.Parameters}).opens(c.s.ctx, desc); err == nil {
			c.problem("a stranger opens it", "layer %s", desc.Digest)
		}
	}
}

func many(n int) string {
	if n > 32 {
		return "more than 32"
	}
	return "32 or less"
}

// checkDecrypt checks that decrypting gives the original.
func (c *trial) checkDecrypt(how string, target ocispec.Descriptor, dc processor.Keys) {
	before := c.s.blobs()
	plain, plainErr := PlaintextOf(c.s.ctx, c.s, target, func(ctx context.Context, layer ocispec.Descriptor) (*processor.LayerKey, error) {
		return processor.Unwrap(ctx, dc, layer)
	})
	if c.s.blobs() != before {
		c.problem(how+" is announced by writing", "%d blobs, were %d", c.s.blobs(), before)
	}
	out, err := Decrypt(c.s.ctx, c.s, target, dc, Options{})
	if err != nil {
		c.problem(how+" fails", "%v", err)
		return
	}
	c.checkOriginal(how, out.Target)
	c.checkPlaintext(how, plain, plainErr, out.Target)
}

// checkPlaintext compares what decrypting was to make with what it made.
func (c *trial) checkPlaintext(how string, plain Plaintext, err error, target ocispec.Descriptor) {
	if err != nil || plain.Target.Digest != target.Digest || plain.Target.MediaType != target.MediaType || plain.Target.Size != target.Size {
		c.problem(how+" is announced wrongly", "%+v, not %+v: %v", plain.Target, target, err)
		return
	}
	for d, doc := range plain.Documents {
		if c.read(ocispec.Descriptor{Digest: d}) != string(doc.Content) {
			c.problem(how+" is announced with another document", "%s", d)
		}
	}
	for d, layer := range plain.Layers {
		if int64(len(c.read(ocispec.Descriptor{Digest: d}))) != layer.Size {
			c.problem(how+" is announced with another layer", "%s for %s", d, layer.Digest)
		}
	}
}

func (c *trial) checkOriginal(how string, got ocispec.Descriptor) {
	if got.Digest != c.Target.Digest || got.MediaType != c.Target.MediaType || got.Size != c.Target.Size {
		c.problem(how+" gives something else", "%s", c.difference(got))
		return
	}
	seen := make(map[digest.Digest]bool)
	var walk func(desc ocispec.Descriptor)
	walk = func(desc ocispec.Descriptor) {
		b := c.Blobs[desc.Digest]
		if b == nil || b.Absent || c.leftOut[desc.Digest] || seen[desc.Digest] {
			return
		}
		seen[desc.Digest] = true
		if c.read(desc) != string(b.Bytes) {
			c.problem(how+" loses a blob", "%s %s", desc.MediaType, desc.Digest)
		}
		for _, child := range b.Children {
			walk(child)
		}
	}
	walk(c.Target)
}

// difference shows the documents that are not the original's, and those of the
// original in whose place they are.
func (c *trial) difference(got ocispec.Descriptor) string {
	e := exported(c.s, got)
	var b strings.Builder
	for d := range e.documents {
		if c.Blobs[d] == nil {
			fmt.Fprintf(&b, "\n+ %s", e.blobs[d])
		}
	}
	for _, d := range c.Digests(imagetest.Document) {
		if !e.documents[d] && !c.Blobs[d].Absent {
			fmt.Fprintf(&b, "\n- %s", c.Blobs[d].Bytes)
		}
	}
	return b.String()
}

func (c *trial) read(desc ocispec.Descriptor) string {
	b, err := content.ReadBlob(c.s.ctx, c.s, ocispec.Descriptor{Digest: desc.Digest})
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// checkPartly decrypts some layers, and then the others.
func (c *trial) checkPartly(target ocispec.Descriptor) {
	some, err := Decrypt(c.s.ctx, c.s, target, decryptConfig(c.to), Options{Layers: []int{c.rng.IntN(3) - 1}})
	if err != nil {
		if !strings.Contains(err.Error(), "the image has no layer") {
			c.problem("decrypt partly fails", "%v", err)
		}
		return
	}
	c.checkDecrypt("decrypt in two steps", some.Target, decryptConfig(c.to))
	again := encryptConfig(c.to)
	again.Keys = decryptConfig(c.to)
	whole, err := Encrypt(c.s.ctx, c.s, some.Target, again, c.opts)
	if err != nil {
		c.problem("encrypt in two steps fails", "%v", err)
		return
	}
	c.checkDecrypt("encrypt in two steps", whole.Target, decryptConfig(c.to))
}

// checkRewrap gives the image other recipients: they open it, and the original
// comes back.
func (c *trial) checkRewrap(target ocispec.Descriptor) {
	if len(c.to) > 8 {
		return
	}
	how := Rewrapping{Keys: decryptConfig(c.to)}
	to := slices.Clone(c.to)
	more := c.recipients.all[c.rng.IntN(len(c.recipients.all))]
	if !slices.ContainsFunc(to, func(r recipient) bool { return r.scheme == more.scheme }) {
		how.Add = encryptConfig([]recipient{more}).Parameters
		to = append(to, more)
		if len(c.to) > 1 && c.rng.IntN(2) == 0 {
			gone := c.to[0].scheme
			rec := Recipient{Scheme: gone}
			how.Remove = append(how.Remove, rec)
			to = slices.DeleteFunc(to, func(r recipient) bool { return r.scheme == gone })
		}
	} else if i := slices.IndexFunc(to, func(r recipient) bool { return r.scheme == "provider.pilot" && r.kek == "a" }); i >= 0 {
		how.From, how.To = "a", "c"
		to[i].kek = "c"
		if slices.ContainsFunc(to, func(r recipient) bool { return r.scheme != "provider.pilot" && r.kek == "a" }) {
			return
		}
	} else {
		return
	}
	out, err := Rewrap(c.s.ctx, c.s, target, how, Options{})
	if err != nil {
		c.problem("rewrap fails", "for %v, not %v: %v", to, c.to, err)
		return
	}
	e := exported(c.s, out.Target)
	gone := slices.DeleteFunc(slices.Clone(c.to), func(r recipient) bool {
		return slices.ContainsFunc(to, func(o recipient) bool { return r.String() == o.String() })
	})
	for _, desc := range e.encrypted {
		for _, r := range to {
			if _, err := r.opens(c.s.ctx, desc); err != nil {
				c.problem("rewrapped, and can't be opened", "by %s, once %v, now %v: %v", r, c.to, to, err)
			}
		}
		for _, r := range gone {
			if _, err := r.opens(c.s.ctx, desc); err == nil {
				c.problem("removed, and still opens it", "%s", r)
			}
		}
	}
	c.checkDecrypt("decrypt after rewrap", out.Target, decryptConfig(to))
}

// manifests calls f for each manifest of the original that is here.
func (c *trial) manifests(f func(desc ocispec.Descriptor, m ocispec.Manifest)) {
	for _, d := range c.Digests(imagetest.Document) {
		b := c.Blobs[d]
		var m ocispec.Manifest
		if json.Unmarshal(b.Bytes, &m) == nil && m.Config.Digest != "" {
			f(ocispec.Descriptor{MediaType: b.MediaType, Digest: d, Size: int64(len(b.Bytes))}, m)
		}
	}
}
