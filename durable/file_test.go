package durable_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"varve.dev/durable"
	"varve.dev/durable/crashsim"
	"varve.dev/errdefs"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newRoot(t testing.TB) *durable.Root {
	t.Helper()
	r, err := durable.Create(filepath.Join(t.TempDir(), "root"), 0o711)
	must(t, err)
	t.Cleanup(func() { r.Close() })
	return r
}

func TestFile(t *testing.T) {
	r := newRoot(t)
	f, err := r.CreateFile("f", 0o640)
	must(t, err)
	for range 3 {
		_, err = f.Write([]byte("abc"))
		must(t, err)
	}
	must(t, f.Truncate(4))
	_, err = f.Write([]byte("Z"))
	must(t, err)
	buf := make([]byte, 5)
	_, err = f.ReadAt(buf, 0)
	must(t, err)
	if string(buf) != "abcaZ" || f.Size() != 5 {
		t.Errorf("%q, size %d", buf, f.Size())
	}
	want := time.Unix(1_600_000_000, 123_456_789)
	must(t, f.SetModTime(want))
	if got, err := f.ModTime(); err != nil || !got.Equal(want) {
		t.Errorf("time %v, %v", got, err)
	}
	must(t, f.Close())
	if _, err := r.CreateFile("f", 0o600); !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Errorf("create again: %v", err)
	}
	f, err = r.AppendFile("f", 0o600)
	must(t, err)
	if f.Size() != 5 {
		t.Errorf("appending begins at %d", f.Size())
	}
	b := r.NewBarrier()
	must(t, f.Seal(b, 0o444))
	must(t, b.Wait("f"))
	if fi, err := os.Lstat(r.Path("f")); err != nil || fi.Mode() != 0o444 {
		t.Errorf("sealed: %v, %v", fi.Mode(), err)
	}
	// A link is not followed.
	must(t, os.Symlink("f", r.Path("l")))
	if _, err := r.AppendFile("l", 0o600); err == nil {
		t.Error("a link was followed")
	}
}

// At every change during a replacement, any aftermath of a power cut has the
// old contents or the new, whole, and after nil the new; other names are
// recognisable as unpublished.
func TestWriteFileIsAtomic(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("REQUIRE_ROOT") == "1" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	r := newRoot(t)
	contents := func(i int) []byte { return bytes.Repeat([]byte{byte('a' + i)}, 4096*3+i) }
	must(t, r.WriteFile("f", contents(0), 0o600))
	sim, err := crashsim.Attach(r, crashsim.Database{})
	must(t, err)
	scratch, n, acked := t.TempDir(), 0, 0
	seen := map[int]bool{}
	sim.Every(1, func(at crashsim.Moment) {
		for seed := range 6 {
			mode := [...]crashsim.Mode{crashsim.None, crashsim.All, crashsim.Some}[min(seed, 2)]
			n++
			dir := filepath.Join(scratch, fmt.Sprint(n))
			must(t, at.Image(dir, mode, uint64(n)))
			data, err := os.ReadFile(filepath.Join(dir, "f"))
			must(t, err)
			i := int(data[0] - 'a')
			if i < acked || i > acked+1 || !bytes.Equal(data, contents(i)) {
				t.Errorf("image %d: %d bytes of %q after %d was acknowledged", n, len(data), data[0], acked)
			}
			seen[i] = true
			entries, err := os.ReadDir(dir)
			must(t, err)
			for _, e := range entries {
				if name := e.Name(); name != "f" && name[:len(durable.TempPrefix)] != durable.TempPrefix {
					t.Errorf("image %d has %s", n, name)
				}
			}
		}
	})
	for i := 1; i < 5; i++ {
		must(t, r.WriteFile("f", contents(i), 0o600))
		acked = i
	}
	must(t, sim.Err())
	if len(seen) != 5 {
		t.Errorf("contents seen: %v", seen)
	}
	t.Logf("%d crash images", n)
}

// Many writers of one name: each version whole, nothing left over.
func TestWriteFileConcurrently(t *testing.T) {
	r := newRoot(t)
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for range 5 {
				if err := r.WriteFile("f", bytes.Repeat([]byte{byte('a' + i)}, 5000), 0o600); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	data, err := os.ReadFile(r.Path("f"))
	must(t, err)
	if !bytes.Equal(data, bytes.Repeat(data[:1], 5000)) {
		t.Error("two versions in one file")
	}
	entries, err := os.ReadDir(r.Path("."))
	must(t, err)
	if len(entries) != 1 {
		t.Errorf("left over: %v", entries)
	}
}
