package content_test

import (
	"io"
	"path/filepath"
	"testing"

	bolt "go.etcd.io/bbolt"

	"varve.dev/durable/crashsim"
	"varve.dev/internal/teststore"
	"varve.dev/layout"
)

// A power cut in a long download leaves all but the last 256 MiB of it.
func TestPowerCutInALongDownload(t *testing.T) {
	o := teststore.New(t)
	sim, err := crashsim.Attach(o.Root, crashsim.Database{Name: layout.DatabaseFile, Copy: func(w io.Writer) error {
		return o.DB.ForCheck().View(func(tx *bolt.Tx) error { _, err := tx.WriteTo(w); return err })
	}})
	if err != nil {
		t.Fatal(err)
	}
	const piece, most = 1 << 20, 256 << 20
	kept := func() int64 {
		dir := filepath.Join(t.TempDir(), "store")
		if err := sim.Image(dir, crashsim.None, 1); err != nil {
			t.Fatal(err)
		}
		left, err := teststore.Open(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		in, err := left.Blobs.OpenIngest(t.Context(), "long", "", 0)
		if err != nil {
			t.Fatal(err)
		}
		n := in.Size()
		if err := in.Discard(); err != nil {
			t.Error(err)
		}
		if err := left.End(); err != nil {
			t.Error(err)
		}
		return n
	}
	in, err := o.Blobs.OpenIngest(t.Context(), "long", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	write := func(bytes int64) {
		for in.Size() < bytes {
			if _, err := in.Write(make([]byte, piece)); err != nil {
				t.Fatal(err)
			}
		}
	}
	write(most/2 - piece)
	if n := kept(); n != 0 {
		t.Errorf("%d MiB of %d are kept, and nothing was synced", n>>20, in.Size()>>20)
	}
	write(most + 10*piece)
	if n := kept(); in.Size()-n > most || n < most/2 {
		t.Errorf("%d MiB of %d are kept", n>>20, in.Size()>>20)
	}
	if err := in.Discard(); err != nil {
		t.Error(err)
	}
}
