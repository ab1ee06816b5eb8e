package daemon

import (
	"context"
	"errors"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"varve.dev/api/varve"
	"varve.dev/errdefs"
	"varve.dev/internal/testkit"
	"varve.dev/layout"
)

// load gives a store an image.
func (k *kept) load(t *testing.T, img testkit.Image) {
	t.Helper()
	archive := img.Archive()
	defer archive.Close()
	if _, err := k.Load(t.Context(), archive, nil); err != nil {
		t.Fatal(err)
	}
}

func (k *kept) info(t *testing.T) varve.Info {
	t.Helper()
	info, err := k.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return info
}

// spoil changes the first byte of one file in a layer, and leaves its times.
func spoil(t *testing.T, root string) {
	t.Helper()
	done := false
	err := filepath.WalkDir(filepath.Join(root, layout.LayersDir), func(name string, d fs.DirEntry, err error) error {
		if err != nil || done || !d.Type().IsRegular() {
			return err
		}
		fi, err := d.Info()
		if err != nil || fi.Size() == 0 {
			return err
		}
		data, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		data[0] ^= 1
		done = true
		if err := os.WriteFile(name, data, 0); err != nil {
			return err
		}
		return os.Chtimes(name, fi.ModTime(), fi.ModTime())
	})
	if err != nil || !done {
		t.Fatalf("nothing to spoil: %v", err)
	}
}

// A daemon finds by itself what goes bad, makes it whole if it is to, and tells
// of its last check.
func TestScrub(t *testing.T) {
	testkit.NeedRoot(t)
	p := testPlace(t)
	k := keepScrubbing(t, p, Scrub{Every: 10 * time.Millisecond, Repair: true})
	k.load(t, testkit.Busybox(t))
	clean := func() bool {
		c := k.info(t).Checked
		return c != nil && c.Background && c.Bytes > 0 && c.Findings == 0
	}
	eventually(t, "a clean check", clean)
	spoil(t, p.Root)
	eventually(t, "said what it found", func() bool { return k.saidOf("L4 loss: layer ") == 1 })
	eventually(t, "healed", func() bool { return k.saidOf("is healed") == 1 })
	eventually(t, "clean again", clean)
}

// A check in the background that the daemon's end cuts off goes on when it is
// there again; the time to the next is counted from its end.
func TestScrubGoesOn(t *testing.T) {
	testkit.NeedRoot(t)
	p := testPlace(t)
	k := keep(t, p)
	k.load(t, testkit.Long(t, 4, 1<<20))
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	must(k.Close(context.Background()))

	k = keepScrubbing(t, p, Scrub{Every: time.Millisecond, Rate: 2 << 20}) // of 8 MiB
	time.Sleep(1500 * time.Millisecond)                                    // some blobs are read, not all
	must(k.Close(context.Background()))

	k = keep(t, p)
	info := k.info(t)
	if len(info.Checking) != 1 || !info.Checking[0].Background || info.Checking[0].Bytes < 1<<20 || info.Checked != nil {
		t.Fatalf("cut off: %+v, before: %+v", info.Checking, info.Checked)
	}
	cut := info.Checking[0]
	must(k.Close(context.Background()))

	k = keepScrubbing(t, p, Scrub{Every: time.Hour})
	eventually(t, "the end of that check", func() bool { return k.info(t).Checked != nil })
	info = k.info(t)
	if c := info.Checked; !c.Started.Equal(cut.Started) || c.Findings != 0 || len(info.Checking) != 0 {
		t.Errorf("it went on as %+v, still to do %+v", c, info.Checking)
	}
	time.Sleep(50 * time.Millisecond)
	if again := k.info(t); !again.Checked.Finished.Equal(info.Checked.Finished) || len(again.Checking) != 0 {
		t.Errorf("another check began before its time: %+v", again.Checked)
	}
}

// The metrics have the last check, on the socket and on a port.
func TestMetrics(t *testing.T) {
	testkit.NeedRoot(t)
	k := keepScrubbing(t, testPlace(t), Scrub{Every: 10 * time.Millisecond})
	k.load(t, testkit.Busybox(t))
	spoil(t, k.options.Root)
	eventually(t, "found", func() bool {
		c := k.info(t).Checked
		return c != nil && c.Findings == 1
	})
	answer := httptest.NewRecorder()
	handler(k.Keeper).ServeHTTP(answer, httptest.NewRequest(http.MethodGet, MetricsPath, nil))
	for _, line := range []string{"varve_check_findings 1\n", "varve_check_losses 1\n", "varve_check_healed 0\n", "varve_check_finished_timestamp_seconds 1.", "varve_build_info{", `varve_space_bytes{of="metadata"} `, "varve_space_free_bytes ", "process_resident_memory_bytes "} {
		if !strings.Contains(answer.Body.String(), "\n"+line) {
			t.Errorf("no %q in: %d\n%s", line, answer.Code, answer.Body)
		}
	}
	for _, addr := range []string{"0.0.0.0:0", ":0", "127.0.0.1", "unix:///x"} {
		if s, err := ServeMetrics(addr, k.Keeper); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("metrics on %q: %v", addr, err)
			if err == nil {
				s.Close()
			}
		}
	}
	s, err := ServeMetrics("127.0.0.1:0", k.Keeper)
	if err == nil {
		err = s.Close()
	}
	if err == nil {
		_, err = k.Fsck(t.Context(), varve.FsckRequest{Level: string(layout.Deep), Repair: true}, nil)
	}
	if err != nil {
		t.Error(err)
	}
}
