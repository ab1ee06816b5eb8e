package durable

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
)

func openDescriptors(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(entries)
}

// Thousands of files from several goroutines: no more descriptors than the
// window, all closed in the end, and one flush for all.
func TestBarrierWindow(t *testing.T) {
	for _, kind := range []string{"tmpfs", "ext4", "xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) {
			r := mounted(t, kind)
			must(t, r.Mkdir("d", 0o700))
			before := openDescriptors(t)
			b := r.NewBarrier()
			const writers, each = 4, 900
			most := make([]int, writers)
			var wg sync.WaitGroup
			for w := range writers {
				wg.Go(func() {
					for i := range each {
						f, err := r.CreateFile(fmt.Sprintf("d/%d-%d", w, i), 0o600)
						if err == nil {
							_, err = f.Write([]byte("contents"))
						}
						if err == nil {
							err = f.Seal(b, 0o444)
						}
						if err != nil {
							t.Error(err)
							return
						}
						if i%100 == 0 {
							most[w] = max(most[w], openDescriptors(t)-before)
						}
					}
				})
			}
			wg.Wait()
			must(t, b.Wait("d"))
			// Each writer has one file open besides, and the listing is
			// one more.
			for _, n := range most {
				if limit := barrierWindow + barrierWindow/2 + 3*writers; n > limit {
					t.Errorf("%d descriptors were open, the window is %d", n, barrierWindow)
				}
			}
			if n := openDescriptors(t); n > before {
				t.Errorf("%d descriptors are open, %d were before", n, before)
			}
			if got := r.ordered(); got != (kind == "ext4" || kind == "xfs") {
				t.Errorf("ordered: %v", got)
			}
		})
	}
}

func TestBarrierAbandon(t *testing.T) {
	r := newRoot(t)
	before := openDescriptors(t)
	b := r.NewBarrier()
	for i := range 20 {
		f, err := r.CreateFile(fmt.Sprint(i), 0o600)
		must(t, err)
		must(t, f.Seal(b, 0o400))
	}
	b.Abandon()
	if n := openDescriptors(t); n != before {
		t.Errorf("%d descriptors are open, %d were before", n, before)
	}
}

// Any failure of write-back fails the barrier and poisons the root, also when
// it comes up long before Wait.
func TestBarrierFailurePoisons(t *testing.T) {
	r := mounted(t, "ext4")
	b := r.NewBarrier()
	var pipe [2]int
	must(t, unix.Pipe2(pipe[:], unix.O_CLOEXEC))
	defer unix.Close(pipe[1])
	bad := os.NewFile(uintptr(pipe[0]), "broken") // cannot be written back
	if err := b.Add(bad); !errors.Is(err, errdefs.ErrPoisoned) {
		t.Errorf("add: %v", err)
	}
	good, err := os.Create(r.Path("good"))
	must(t, err)
	if err := b.Add(good); err == nil {
		t.Error("a file was taken after the failure")
	}
	if err := b.Wait(); !errors.Is(err, errdefs.ErrPoisoned) {
		t.Errorf("wait: %v", err)
	}
	if r.Poisoned() == nil {
		t.Error("the root is not poisoned")
	}
}

// The marker stays small however often it is used, also by many at once.
func TestMarker(t *testing.T) {
	r := mounted(t, "ext4")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 20 {
				if err := r.NewBarrier().Wait(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	fi, err := os.Lstat(r.Path(MarkerName))
	must(t, err)
	if fi.Size() == 0 || fi.Size() > 4096 {
		t.Errorf("marker of %d bytes", fi.Size())
	}
}
