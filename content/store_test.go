package content_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/testsuite"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/content"
	"varve.dev/errdefs"
	"varve.dev/internal/testkit"
	"varve.dev/internal/teststore"
	"varve.dev/journal"
	"varve.dev/layout"
)

func TestContainerdSuite(t *testing.T) {
	testsuite.ContentSuite(t, "varve", func(ctx context.Context, root string) (context.Context, ccontent.Store, func() error, error) {
		o, err := teststore.Open(ctx, root)
		if err != nil {
			return nil, nil, nil, err
		}
		return ctx, o.Blobs, o.End, nil
	})
}

func put(t *testing.T, s *content.Store, data []byte) layout.BlobDigest {
	t.Helper()
	d := digest.FromBytes(data)
	err := ccontent.WriteBlob(t.Context(), s, "put-"+d.Encoded(), bytes.NewReader(data), ocispec.Descriptor{Digest: d, Size: int64(len(data))})
	if err != nil {
		t.Fatal(err)
	}
	return layout.BlobDigest(d)
}

func TestBlobHasItsNameAndMode(t *testing.T) {
	o := teststore.New(t)
	d := put(t, o.Blobs, []byte("once laid down"))
	fi, err := os.Lstat(o.Root.Path(layout.BlobPath(d)))
	if err != nil {
		t.Fatal(err)
	}
	if fi.Mode() != 0o444 {
		t.Errorf("mode %v, want 0444", fi.Mode())
	}
	got, err := o.Blobs.ReadBlob(t.Context(), d, 1<<20)
	if err != nil || string(got) != "once laid down" {
		t.Errorf("read %q, %v", got, err)
	}
}

func TestResumeAfterReopen(t *testing.T) {
	dir := t.TempDir()
	data := bytes.Repeat([]byte("varve"), 100_000)
	d := layout.BlobDigest(digest.FromBytes(data))
	o, err := teststore.Open(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	in, err := o.Blobs.OpenIngest(t.Context(), "half", d, int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := in.Write(data[:123_456]); err != nil {
		t.Fatal(err)
	}
	in.Close()
	if err := o.End(); err != nil {
		t.Fatal(err)
	}

	if o, err = teststore.Open(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	in, err = o.Blobs.OpenIngest(t.Context(), "half", d, int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	if in.Size() != 123_456 {
		t.Errorf("resumed at %d, want 123456", in.Size())
	}
	if _, err := in.Write(data[in.Size():]); err != nil {
		t.Fatal(err)
	}
	if err := in.Verify(int64(len(data)), d); err != nil {
		t.Error(err)
	}
	in.Close()
	if err := o.End(); err != nil {
		t.Fatal(err)
	}
}

// An ingest for one writer alone goes when it is closed, and with its process.
func TestIngestOfOneWriter(t *testing.T) {
	dir := t.TempDir()
	o, err := teststore.Open(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	for closed := range 2 {
		in, err := o.Blobs.NewIngest(t.Context(), "one", "")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := in.Write([]byte("half")); err != nil {
			t.Fatal(err)
		}
		if closed == 1 {
			continue // as a process does that is killed
		}
		if err := in.Close(); err != nil {
			t.Fatal(err)
		}
		if left := ingests(t, o); left > 0 {
			t.Errorf("%d ingests are left of one that was closed", left)
		}
	}
	if list, err := o.Blobs.ListStatuses(t.Context()); err != nil || len(list) > 0 {
		t.Errorf("listed for others: %v, %v", list, err)
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	if o, err = teststore.Open(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if left := ingests(t, o); left > 0 {
		t.Errorf("%d ingests are left after recovery", left)
	}
	if err := o.End(); err != nil {
		t.Fatal(err)
	}
}

func ingests(t *testing.T, o *teststore.Store) int {
	t.Helper()
	entries, err := os.ReadDir(o.Root.Path(layout.IngestDir))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// What was left of a blob that has come another way goes with the next
// opening; what may still be wanted stays.
func TestIngestOfABlobThatIsHere(t *testing.T) {
	dir := t.TempDir()
	o, err := teststore.Open(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	here, wanted := []byte("it comes another way"), []byte("it does not come")
	for ref, data := range map[string][]byte{"here": here, "wanted": wanted} {
		in, err := o.Blobs.OpenIngest(t.Context(), ref, layout.BlobDigest(digest.FromBytes(data)), int64(len(data)))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := in.Write(data[:3]); err != nil {
			t.Fatal(err)
		}
		in.Close()
	}
	put(t, o.Blobs, here)
	if err := o.End(); err != nil {
		t.Fatal(err)
	}
	if o, err = teststore.Open(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if list, err := o.Blobs.ListStatuses(t.Context()); err != nil || len(list) != 1 || list[0].Ref != "wanted" {
		t.Errorf("left are %v, %v", list, err)
	}
	if err := o.End(); err != nil {
		t.Fatal(err)
	}
}

// A sealed ingest still says how much it holds.
func TestSealedSize(t *testing.T) {
	o := teststore.New(t)
	in, err := o.Blobs.NewIngest(t.Context(), "one", "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := in.Write([]byte("four")); err != nil {
		t.Fatal(err)
	}
	barrier := o.Root.NewBarrier()
	defer barrier.Abandon()
	if _, err := in.Seal(barrier, layout.BlobRecord{}); err != nil {
		t.Fatal(err)
	}
	if in.Size() != 4 {
		t.Errorf("it holds %d bytes", in.Size())
	}
	if err := in.Discard(); err != nil {
		t.Error(err)
	}
}

func TestLyingDigestGetsNoName(t *testing.T) {
	o := teststore.New(t)
	lie := digest.FromString("something else")
	err := ccontent.WriteBlob(t.Context(), o.Blobs, "lie", bytes.NewReader([]byte("the truth")),
		ocispec.Descriptor{Digest: lie, Size: 9})
	if !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("error %v, want ErrFailedPrecondition", err)
	}
	if _, err := o.Blobs.Info(t.Context(), lie); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("info of the lie: %v, want ErrNotFound", err)
	}
}

func TestDeletedBlobLeavesNothing(t *testing.T) {
	o := teststore.New(t)
	d := put(t, o.Blobs, []byte("to be removed"))
	if err := o.Blobs.Delete(t.Context(), d.Digest()); err != nil {
		t.Fatal(err)
	}
	if err := o.Journal.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(o.Root.Path(layout.BlobPath(d))); !os.IsNotExist(err) {
		t.Errorf("file after drain: %v", err)
	}
	if got := put(t, o.Blobs, []byte("to be removed")); got != d {
		t.Errorf("put again gave %s", got)
	}
}

// A blob that is published while its old file is being swept must end up
// with a file: the race that moby and containerd both lost.
func TestSweepAgainstPublish(t *testing.T) {
	o := teststore.New(t)
	data := []byte("swept and wanted")
	for range 200 {
		d := put(t, o.Blobs, data)
		if err := o.Blobs.Delete(t.Context(), d.Digest()); err != nil {
			t.Fatal(err)
		}
	}
	d := put(t, o.Blobs, data)
	if err := o.Journal.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	r, err := o.Blobs.ReaderAt(t.Context(), ocispec.Descriptor{Digest: d.Digest()})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	got, err := io.ReadAll(io.NewSectionReader(r, 0, r.Size()))
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("read %q, %v", got, err)
	}
}

func TestDamagedBlobIsNeverServed(t *testing.T) {
	o, err := teststore.Open(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	d := put(t, o.Blobs, []byte("whole"))
	path := o.Root.Path(layout.BlobPath(d))
	if err := os.Truncate(path, 2); err != nil {
		t.Fatal(err)
	}
	_, err = o.Blobs.ReaderAt(t.Context(), ocispec.Descriptor{Digest: d.Digest()})
	if c := errdefs.AsCorrupt(err); c == nil || c.Invariant != "B2" {
		t.Errorf("short blob: %v, want Corrupt B2", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	_, err = o.Blobs.ReaderAt(t.Context(), ocispec.Descriptor{Digest: d.Digest()})
	if c := errdefs.AsCorrupt(err); c == nil || c.Invariant != "B1" {
		t.Errorf("missing blob: %v, want Corrupt B1", err)
	}
}

// What an earlier writer left is taken up from the disk, not from the page
// cache: after a sync that failed the two differ, and nothing tells.
func TestResumeReadsTheDisk(t *testing.T) {
	disk := testkit.Ext4(t, 64)
	o, err := teststore.Open(t.Context(), filepath.Join(disk.Dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("what was written"), 1<<14)
	first, err := o.Blobs.OpenIngest(t.Context(), "ref", "", 0)
	if err == nil {
		_, err = first.Write(data)
	}
	if err := errors.Join(err, first.Close()); err != nil {
		t.Fatal(err)
	}
	disk.Spoil(t, data[:4096])
	second, err := o.Blobs.OpenIngest(t.Context(), "ref", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	if second.Digest() == layout.BlobDigest(digest.FromBytes(data)) {
		t.Error("what the disk does not have is taken up")
	}
	if err := errors.Join(second.Discard(), o.Close()); err != nil {
		t.Error(err)
	}
}

// What nobody can go on with is gone when the store is opened again: a private
// ingest, and one whose data were published when the power went.
func TestIngestsThatNobodyGoesOnWith(t *testing.T) {
	dir := t.TempDir()
	o, err := teststore.Open(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	begin := func(in *content.Ingest, err error) {
		t.Helper()
		if err == nil {
			_, err = in.Write([]byte("half of it"))
		}
		if err := errors.Join(err, in.Close()); err != nil {
			t.Fatal(err)
		}
	}
	begin(o.Blobs.NewIngest(t.Context(), "load", ""))
	begin(o.Blobs.OpenIngest(t.Context(), "published", "", 0))
	begin(o.Blobs.OpenIngest(t.Context(), "shared", "", 0))
	data := filepath.Join(layout.IngestPath(layout.IngestFor("published")), layout.IngestData)
	if err := errors.Join(o.Root.Remove(data), o.Close()); err != nil {
		t.Fatal(err)
	}
	if o, err = teststore.Open(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	left, err := o.Blobs.ListStatuses(t.Context())
	if err != nil || len(left) != 1 || left[0].Ref != "shared" {
		t.Errorf("left: %v, %v", left, err)
	}
	if entries, err := os.ReadDir(filepath.Join(dir, layout.IngestDir)); err != nil || len(entries) != 1 {
		t.Errorf("left: %v, %v", entries, err)
	}
	if err := o.End(); err != nil {
		t.Error(err)
	}
}

// A blob whose publication fails when its intent is recorded belongs to the
// journal. Whoever comes with the same reference finishes it first, and touches
// nothing while that fails.
func TestPublicationThatFailsHalfWay(t *testing.T) {
	o := teststore.New(t)
	data := []byte("once laid down")
	d := digest.FromBytes(data)
	desc := ocispec.Descriptor{Digest: d, Size: int64(len(data))}
	write := func() error {
		return ccontent.WriteBlob(t.Context(), o.Blobs, "ref", bytes.NewReader(data), desc)
	}
	blobs := o.Root.Path("blobs/sha256")
	if err := errors.Join(os.Rename(blobs, blobs+".moved"), os.WriteFile(blobs, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := write(); !errors.Is(err, journal.ErrIntended) {
		t.Errorf("without a place for blobs: %v", err)
	}
	if err := write(); err == nil {
		t.Error("once more, the same goes well")
	}
	if err := o.Blobs.Abort(t.Context(), "ref"); err == nil {
		t.Error("the journal's ingest can be thrown away")
	}
	if err := errors.Join(os.Remove(blobs), os.Rename(blobs+".moved", blobs)); err != nil {
		t.Fatal(err)
	}
	if err := write(); err != nil && !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Error(err)
	}
	if got, err := o.Blobs.ReadBlob(t.Context(), layout.BlobDigest(d), 1<<20); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%q, %v", got, err)
	}
}

// A power cut may leave the length of an unfinished blob without its data: it is
// gone on with behind what there is.
func TestResumeBeforeAHole(t *testing.T) {
	o := teststore.New(t)
	in, err := o.Blobs.OpenIngest(t.Context(), "holed", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := in.Write(bytes.Repeat([]byte("x"), 64<<10)); err != nil {
		t.Fatal(err)
	}
	in.Close()
	data := o.Root.Path(filepath.Join(layout.IngestPath(layout.IngestFor("holed")), layout.IngestData))
	if err := os.Truncate(data, 1<<20); err != nil {
		t.Fatal(err)
	}
	if in, err = o.Blobs.OpenIngest(t.Context(), "holed", "", 0); err != nil {
		t.Fatal(err)
	}
	if in.Size() != 64<<10 {
		t.Errorf("it goes on at %d", in.Size())
	}
	if err := in.Discard(); err != nil {
		t.Error(err)
	}
}
