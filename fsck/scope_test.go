package fsck_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"varve.dev/errdefs"
	"varve.dev/fsck"
	"varve.dev/layout"
)

// flip changes a byte of a blob.
func (s *store) flip(t *testing.T, d layout.BlobDigest) { flipAt(t, s.path(layout.BlobPath(d)), 0) }

// many adds blobs of a size to the image.
func (s *store) many(t *testing.T, count, size int) (blobs []layout.BlobDigest, total int64) {
	s.in(t, func(tx *bolt.Tx) error {
		for i := range count {
			data := make([]byte, size)
			copy(data, fmt.Sprint(i))
			d := s.addBlob(t, tx, data)
			link(t, tx, layout.ImageNode("image"), layout.RelContent, layout.BlobNode(d))
			blobs = append(blobs, d)
		}
		return nil
	})
	slices.Sort(blobs)
	return blobs, int64(count * size)
}

func numbers(r *fsck.Report) (out []string) {
	for _, f := range r.Findings {
		out = append(out, f.Invariant)
	}
	return out
}

func TestWhatIsChosenIsChecked(t *testing.T) {
	s := makeStore(t)
	s.flip(t, s.blob)                                                       // which a lease holds
	must(t, os.Chmod(s.file("d/other"), 0o600))                             // of the image and the container
	must(t, os.Chmod(s.path(layout.BlobPath(s.manifest)), 0o600))           // of the image
	must(t, os.Remove(s.path(layout.ContainerPath("cafe"), "config.json"))) // of the container
	must(t, os.WriteFile(s.path("stranger"), nil, 0o600))                   // of the store
	for name, want := range map[string][]string{
		"":                     {"B3", "B5", "C1", "L4", "R1"},
		"image":                {"B5", "L4"},
		s.index.Hex()[:12]:     {"B5", "L4"},
		s.config.Hex()[:12]:    {"B5", "L4"}, // the image's id
		string(s.blob)[:20]:    {"B3"},
		string(baseLayer):      {"L4"},
		"cafe":                 {"C1", "L4"},
		string(s.config)[:7+4]: {"B5", "L4"},
	} {
		opts := fsck.Options{Root: s.dir, Level: layout.Deep}
		if name != "" {
			opts.Of = []string{name}
		}
		r, err := fsck.Run(t.Context(), opts)
		if must(t, err); !slices.Equal(numbers(r), want) {
			t.Errorf("of %q: %v, want %v: %+v", name, numbers(r), want, r.Findings)
		}
	}
	for _, name := range []string{"nobody", "ba", "sha256:"} {
		if _, err := fsck.Run(t.Context(), fsck.Options{Root: s.dir, Of: []string{"image", name}}); !errors.Is(err, errdefs.ErrNotFound) {
			t.Errorf("of %q: %v", name, err)
		}
	}
}

// A reference that is lost is said of what is chosen, and what it led to is
// looked at.
func TestChosenByALostEdge(t *testing.T) {
	s := makeStore(t)
	s.in(t, func(tx *bolt.Tx) error {
		unlink(t, tx, layout.ImageNode("image"), layout.RelTarget, layout.BlobNode(s.index))
		unlink(t, tx, layout.BlobNode(s.manifest), layout.RelContent, layout.BlobNode(s.config))
		return nil
	})
	must(t, os.Chmod(s.file("d/other"), 0o600))
	r, err := fsck.Run(t.Context(), fsck.Options{Root: s.dir, Level: layout.Deep, Of: []string{"image"}})
	if must(t, err); !slices.Equal(numbers(r), []string{"E3", "E3", "E4", "L4"}) && !slices.Equal(numbers(r), []string{"E3", "E3", "E4", "E4", "L4"}) {
		t.Errorf("%v: %+v", numbers(r), r.Findings)
	}
}

// TestSample reads a share of the contents, each time another, and compares all
// the rest.
func TestSample(t *testing.T) {
	s := makeStore(t)
	blobs, total := s.many(t, 400, 10_000)
	must(t, os.Chmod(s.file("d"), 0o700))
	s.flip(t, blobs[7])
	found := 0
	const checks, share = 40, 0.25
	for range checks {
		r, err := fsck.Run(t.Context(), fsck.Options{Root: s.dir, Level: layout.Deep, Sample: share})
		must(t, err)
		if got := float64(r.Bytes) / float64(total); got < 0.1 || got > 0.4 {
			t.Errorf("a sample of %g read %.2f of the bytes", share, got)
		}
		switch got := numbers(r); {
		case slices.Equal(got, []string{"B3", "L4"}):
			found++
		case !slices.Equal(got, []string{"L4"}):
			t.Errorf("found: %v", got)
		}
	}
	// A file manifest is read whole whatever is drawn.
	s.flip(t, s.files)
	for range 5 {
		r, err := fsck.Run(t.Context(), fsck.Options{Root: s.dir, Level: layout.Deep, Sample: 1e-6})
		if must(t, err); !slices.Equal(numbers(r), []string{"L3"}) {
			t.Errorf("a bad file manifest, not in the sample: %v", r.Findings)
		}
	}
	if found == 0 || found > checks*2/3 {
		t.Errorf("%d of %d checks of a quarter found one bad blob", found, checks)
	}
	if _, err := fsck.Run(t.Context(), fsck.Options{Root: s.dir, Sample: 1.5}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("a sample of 1.5: %v", err)
	}
}

// TestResumeTwice cuts a check off before it has come to what an earlier part
// found, and before a layer whose file manifest was bad; what came since is read
// as well.
func TestResumeTwice(t *testing.T) {
	s := makeStore(t)
	blobs, _ := s.many(t, 40, 20_000)
	s.flip(t, blobs[3])
	var files layout.BlobDigest // of the first layer, which is not looked at for what is wrong with them
	s.in(t, func(tx *bolt.Tx) error {
		edit(t, tx, layout.BucketLayers, string(topLayer), func(r *layout.LayerRecord) { files = r.Manifest })
		return nil
	})
	good, err := os.ReadFile(s.path(layout.BlobPath(files)))
	must(t, err)
	s.flip(t, files)
	must(t, os.Chmod(s.path(layout.LayerPath(topLayer), layout.TreeDir), 0o700))
	var cut layout.CheckRecord
	part := func(from *layout.CheckRecord, enough int64) error {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		_, err := fsck.Run(ctx, fsck.Options{
			Root: s.dir, Level: layout.Deep, Resume: from, Workers: 1, Rate: 1 << 30, Mark: func(r layout.CheckRecord) { cut = r },
			Progress: func(done, _ int64) {
				if done >= enough {
					cancel()
				}
			},
		})
		return err
	}
	whole, err := fsck.Run(t.Context(), fsck.Options{Root: s.dir, Level: layout.Deep})
	must(t, err)
	// The first part ends in the tree of the last layer, the second at once.
	_ = part(nil, whole.Bytes)
	first := cut
	_ = part(&first, first.Bytes+1)
	must(t, os.WriteFile(s.path(layout.BlobPath(files)), good, 0))
	young := layout.BlobDigest("sha256:" + strings.Repeat("0", 64))
	s.in(t, func(tx *bolt.Tx) error {
		put(t, tx, layout.BucketBlobs, string(young), layout.BlobRecord{Size: 3, Created: time.Now().UTC()})
		link(t, tx, layout.ImageNode("image"), layout.RelContent, layout.BlobNode(young))
		return nil
	})
	must(t, os.WriteFile(s.path(layout.BlobPath(young)), []byte("bad"), 0o444))
	r, err := fsck.Run(t.Context(), fsck.Options{Root: s.dir, Level: layout.Deep, Resume: &cut})
	must(t, err)
	if !slices.Equal(numbers(r), []string{"B3", "B3", "L4"}) {
		t.Errorf("cut at %+v, then %+v: %v", first, cut, r.Findings)
	}
}

// TestResume cuts a check off and has another go on: it reads what was not read
// and what was bad, whatever that is by now.
func TestResume(t *testing.T) {
	for _, workers := range []int{1, 0} {
		t.Run(fmt.Sprint(workers), func(t *testing.T) { resumes(t, workers) })
	}
}

func resumes(t *testing.T, workers int) {
	s := makeStore(t)
	blobs, total := s.many(t, 200, 20_000)
	healed, bad, later := blobs[2], blobs[3], blobs[190]
	good, err := os.ReadFile(s.path(layout.BlobPath(healed)))
	must(t, err)
	for _, d := range []layout.BlobDigest{healed, bad, later} {
		s.flip(t, d)
	}
	var cut layout.CheckRecord
	ctx, cancel := context.WithCancel(t.Context())
	_, err = fsck.Run(ctx, fsck.Options{
		Root: s.dir, Level: layout.Deep, Workers: workers, Mark: func(r layout.CheckRecord) { cut = r },
		Progress: func(done, _ int64) {
			if done > total/2 {
				cancel()
			}
		},
	})
	if !errors.Is(err, context.Canceled) || cut.Blob < blobs[50] || cut.Blob > blobs[150] || cut.Bytes < total/2 {
		t.Fatalf("cut off: %v, at %+v", err, cut)
	}
	must(t, os.WriteFile(s.path(layout.BlobPath(healed)), good, 0))
	went := time.Now()
	r, err := fsck.Run(t.Context(), fsck.Options{Root: s.dir, Level: layout.Deep, Resume: &cut})
	must(t, err)
	var objects []string
	for _, f := range r.Findings {
		objects = append(objects, f.Object)
	}
	if want := []string{"blob " + string(bad), "blob " + string(later)}; !slices.Equal(objects, want) {
		t.Errorf("found %v, want %v", objects, want)
	}
	if !r.Started.Equal(cut.Started) || r.Resumed.Before(went) {
		t.Errorf("started %v, resumed %v", r.Started, r.Resumed)
	}
	whole, err := fsck.Run(t.Context(), fsck.Options{Root: s.dir, Level: layout.Deep})
	must(t, err)
	// What is read twice is what was bad and what was under way at the cut; of
	// several readers one may have waited for the processor, and what the others
	// read meanwhile is under way, too.
	twice := total / 10
	if workers != 1 {
		twice = total / 4
	}
	if more := r.Bytes - whole.Bytes; more < 0 || more > twice {
		t.Errorf("%d bytes in two parts, %d at once", r.Bytes, whole.Bytes)
	}
	if r.Files != whole.Files {
		t.Errorf("%d files in two parts, %d at once", r.Files, whole.Files)
	}
	if _, err := fsck.Run(t.Context(), fsck.Options{Root: s.dir, Level: layout.Quick, Resume: &cut}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("a quick check goes on: %v", err)
	}
}
