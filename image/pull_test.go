package image

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
)

func TestPullByTagAndDigest(t *testing.T) {
	testkit.NeedRoot(t)
	img := testkit.Awkward(t)
	o, proxy, ref := setup(t, img, "lib/awkward:1")
	var events eventLog
	got, err := o.Pull(t.Context(), ref, PullOptions{Progress: events.add})
	if err != nil {
		t.Fatal(err)
	}
	if !got.Fresh || got.Target.Digest != img.Target.Digest || got.Name != ref.String() {
		t.Errorf("pulled %+v", got)
	}
	if o.unpacker.unpacked.Load() != 12 {
		t.Errorf("unpacked %d layers of 12", o.unpacker.unpacked.Load())
	}
	for _, d := range layersOf(t, o, img.Target) {
		if last := events.last(d.Digest); last.Phase != Done || last.Bytes != d.Size {
			t.Errorf("layer %s ended as %+v", d.Digest, last)
		}
	}
	if left := o.ingests(t); len(left) > 0 {
		t.Errorf("ingests are left: %v", left)
	}

	// Again: one question for the tag, nothing else.
	before := len(proxy.Requests())
	if _, err = o.Pull(t.Context(), ref, PullOptions{}); err != nil {
		t.Fatal(err)
	}
	if asked := proxy.Requests()[before:]; len(asked) != 1 {
		t.Errorf("the second pull asked %q", asked)
	}

	// By digest: the documents are there already, nothing is fetched.
	byDigest := ref.WithDigest(img.Target.Digest)
	if _, err := o.Pull(t.Context(), byDigest, PullOptions{}); err != nil {
		t.Fatal(err)
	}
	// By bytes, not by requests: a connection may break before its first one.
	for _, d := range layersOf(t, o, img.Target) {
		if n := proxy.Sent("/blobs/" + d.Digest.String()); n != d.Size {
			t.Errorf("%d bytes were sent of layer %s, which has %d: %q", n, d.Digest, d.Size, proxy.Requests())
		}
	}
}

func layersOf(t *testing.T, o *opened, target ocispec.Descriptor) []ocispec.Descriptor {
	t.Helper()
	p, err := o.localPick(t.Context(), target)
	if err != nil {
		t.Fatal(err)
	}
	return p.layers
}

// TestPullFaults: whatever the registry does to the layer, the pull either
// succeeds with the right bytes or ends soon, with one error of the right
// kind that names the layer, and nothing in the store.
func TestPullFaults(t *testing.T) {
	testkit.NeedRoot(t)
	img := testkit.Busybox(t)
	layer := firstLayer(t, img)
	onLayer := func(first, later testkit.Fault) testkit.Rule {
		return func(r *http.Request, n int) testkit.Fault {
			switch {
			case r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, layer.Digest.String()):
				return testkit.Fault{}
			case n == 1:
				return first
			}
			return later
		}
	}
	always := func(f testkit.Fault) testkit.Rule { return onLayer(f, f) }
	half := layer.Size / 2
	for _, test := range []struct {
		name string
		rule testkit.Rule
		want error
		says string
		sent int64 // at most so many bytes beyond the layer's size
	}{
		{name: "cut once", rule: onLayer(testkit.Fault{Cut: true, CutAt: half}, testkit.Fault{}), sent: 1 << 20},
		{name: "cut again and again", rule: func(r *http.Request, n int) testkit.Fault {
			if strings.HasSuffix(r.URL.Path, layer.Digest.String()) && n < 9 {
				return testkit.Fault{Cut: true, CutAt: layer.Size * int64(n) / 9}
			}
			return testkit.Fault{}
		}, sent: 1 << 20},
		{name: "silent once", rule: onLayer(testkit.Fault{Silent: true, SilentAt: half}, testkit.Fault{}), sent: 1 << 20},
		{name: "no answer once", rule: onLayer(testkit.Fault{Mute: true}, testkit.Fault{}), sent: 1 << 20},
		{name: "cut, no Range", rule: onLayer(testkit.Fault{Cut: true, CutAt: half}, testkit.Fault{NoRange: true}), sent: layer.Size},
		{name: "429 once", rule: onLayer(testkit.Fault{Status: 429, RetryAfter: 1}, testkit.Fault{}), sent: 1 << 20},
		{name: "500 once", rule: onLayer(testkit.Fault{Status: 500}, testkit.Fault{}), sent: 1 << 20},

		{name: "wrong byte", rule: always(testkit.Fault{Flip: true, FlipByte: half}), want: errdefs.ErrFailedPrecondition, says: "has the digest", sent: 1 << 20},
		{name: "short", rule: always(testkit.Fault{Short: true}), want: errdefs.ErrFailedPrecondition, says: "were announced", sent: 1 << 20},
		{name: "silent", rule: always(testkit.Fault{Silent: true, SilentAt: half}), want: errdefs.ErrUnavailable, says: "no data", sent: 1 << 20},
		{name: "no answer", rule: always(testkit.Fault{Mute: true}), want: errdefs.ErrUnavailable, says: "no answer", sent: 1 << 20},
		{name: "cut at the same byte", rule: always(testkit.Fault{Cut: true, CutAt: half}), want: errdefs.ErrUnavailable, says: "attempts", sent: 1 << 20},
		{name: "429", rule: always(testkit.Fault{Status: 429, RetryAfter: 3600}), want: errdefs.ErrUnavailable, says: "asks to wait 1h", sent: 0},
		{name: "500", rule: always(testkit.Fault{Status: 500}), want: errdefs.ErrUnavailable, says: "500", sent: 0},
		{name: "404", rule: always(testkit.Fault{Status: 404}), want: errdefs.ErrNotFound, says: "not there", sent: 0},
		{name: "403", rule: always(testkit.Fault{Status: 403}), want: errdefs.ErrPermissionDenied, says: "403", sent: 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			o, proxy, ref := setup(t, img, "lib/busybox:latest")
			proxy.SetRule(test.rule)
			start := time.Now()
			_, err := o.Pull(t.Context(), ref, PullOptions{})
			if took := time.Since(start); took > 15*time.Second {
				t.Errorf("took %s", took)
			}
			if sent := proxy.Sent(layer.Digest.String()); sent > layer.Size+test.sent {
				t.Errorf("%d bytes were sent of a layer of %d: %q", sent, layer.Size, proxy.Requests())
			}
			if test.want == nil {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if !errors.Is(err, test.want) {
				t.Fatalf("error %v, want kind %v", err, test.want)
			}
			for _, part := range []string{test.says, layer.Digest.String(), "busybox"} {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("the error does not say %q: %v", part, err)
				}
			}
			o.empty(t)
			if left := o.ingests(t); len(left) > 0 && !errors.Is(err, errdefs.ErrUnavailable) {
				t.Errorf("an ingest is kept that no next pull goes on from: %v", left)
			}
			// The registry is well again: the next pull succeeds.
			proxy.SetRule(nil)
			if _, err := o.Pull(t.Context(), ref, PullOptions{}); err != nil {
				t.Errorf("after the fault: %v", err)
			}
		})
	}
}

func firstLayer(t *testing.T, img testkit.Image) ocispec.Descriptor {
	t.Helper()
	var m ocispec.Manifest
	readFile(t, testkit.BlobPath(img.Dir, img.Target.Digest), &m)
	return m.Layers[0]
}

// TestPullResumes: a pull that was cancelled half-way leaves its bytes for the
// next one, in another process too; bytes that went bad meanwhile are thrown
// away and the blob is fetched anew.
func TestPullResumes(t *testing.T) {
	testkit.NeedRoot(t)
	img := testkit.Busybox(t)
	layer := firstLayer(t, img)
	for _, damage := range []bool{false, true} {
		o, proxy, ref := setup(t, img, "lib/busybox:latest")
		proxy.SetRule(func(r *http.Request, _ int) testkit.Fault {
			if strings.HasSuffix(r.URL.Path, layer.Digest.String()) {
				return testkit.Fault{Cut: true, CutAt: layer.Size / 2}
			}
			return testkit.Fault{}
		})
		if _, err := o.Pull(t.Context(), ref, PullOptions{}); !errors.Is(err, errdefs.ErrUnavailable) {
			t.Fatalf("error %v", err)
		}
		o.empty(t)
		if n := len(o.ingests(t)); n != 1 {
			t.Fatalf("%d ingests are kept, one should be", n)
		}
		if damage {
			flipIngest(t, o, layer.Digest)
		}
		first := proxy.Sent(layer.Digest.String())
		proxy.SetRule(nil)
		if _, err := o.Pull(t.Context(), ref, PullOptions{}); err != nil {
			t.Fatalf("damage %v: %v", damage, err)
		}
		sent := proxy.Sent(layer.Digest.String()) - first
		if !damage && sent > layer.Size/2+1 {
			t.Errorf("the second pull fetched %d bytes, half of %d was there", sent, layer.Size)
		}
	}
}

// TestPullCancelledAtItsEnd: when everything is fetched and unpacked and nothing
// is recorded yet. The next pull fetches no layer again.
func TestPullCancelledAtItsEnd(t *testing.T) {
	testkit.NeedRoot(t)
	img := testkit.Busybox(t)
	layer := firstLayer(t, img)
	o, proxy, ref := setup(t, img, "lib/busybox:latest")
	ctx, cancel := context.WithCancel(t.Context())
	durable.OnPoint(func(point string) {
		if point == layout.PointPublishDurable {
			cancel()
		}
	})
	defer durable.OnPoint(nil)
	if _, err := o.Pull(ctx, ref, PullOptions{}); !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v", err)
	}
	o.empty(t)
	sent := proxy.Sent(layer.Digest.String())
	if _, err := o.Pull(t.Context(), ref, PullOptions{}); err != nil {
		t.Fatal(err)
	}
	if again := proxy.Sent(layer.Digest.String()) - sent; again > 0 {
		t.Errorf("the second pull fetched %d bytes", again)
	}
}
