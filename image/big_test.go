package image

import (
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"varve.dev/internal/testkit"
)

// TestPullUnpacks: a second pull of the tag finds everything
// there, and one of another image that shares layers fetches the rest only.
func TestPullUnpacks(t *testing.T) {
	testkit.NeedRoot(t)
	o, proxy, ref := setup(t, testkit.Debian(t), "lib/debian:1")
	if got := pull(t, o, ref); !got.Fresh {
		t.Error("the first pull brought nothing")
	}
	if got := pull(t, o, ref); got.Fresh {
		t.Error("the second pull found something missing")
	}
	details, err := o.Inspect(t.Context(), ref.String())
	if err != nil || string(details.Snapshot) != string(details.Image.RootFS.DiffIDs[0]) {
		t.Errorf("snapshot %q, %v", details.Snapshot, err)
	}
	if r, err := o.ResolveLocal(t.Context(), details.ID.String(), nil); err != nil || digest.FromBytes(r.JSON) != details.ID {
		t.Errorf("resolved here: %+v, %v", r, err)
	}
	if _, err := o.Remove(t.Context(), ref.String(), false); err != nil {
		t.Fatal(err)
	}
	o.empty(t)
	if got := pull(t, o, ref); !got.Fresh {
		t.Error("the pull after the removal brought nothing")
	}
	if _, err := o.Remove(t.Context(), ref.String(), false); err != nil {
		t.Fatal(err)
	}
	if r, err := o.Resolve(t.Context(), ref, nil); err != nil || r.Config.Digest != details.ID || digest.FromBytes(r.JSON) != details.ID {
		t.Errorf("resolved there: %+v, %v", r, err)
	}
	o.empty(t)
	if n := proxy.Count(http.MethodGet, ""); n != 2*(1+1+1)+2 {
		t.Errorf("%d GETs for two pulls", n)
	}
}

// BenchmarkPullBig pulls the image of 1 GB from a registry on this machine
// into a store under BENCH_DIR (default: the temporary folder), with trees and
// durability. Peak memory is that of the whole process so far.
func BenchmarkPullBig(b *testing.B) {
	img := testkit.Big(b)
	r := testkit.Registry(b)
	ref, err := ParseRef(r.Push(b, img, "big:latest"))
	if err != nil {
		b.Fatal(err)
	}
	before := peak(b)
	for b.Loop() {
		b.StopTimer()
		o := openStoreIn(b, b.TempDir(), RemoteOptions{Patience: DefaultPatience()})
		b.StartTimer()
		if _, err := o.Pull(b.Context(), ref, PullOptions{}); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(before)/1024, "MiB-before")
	b.ReportMetric(float64(peak(b))/1024, "MiB-peak")
}

// peak is the highest resident memory of this process in KiB.
func peak(b *testing.B) int {
	b.Helper()
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(rest), " kB"))
			if err != nil {
				b.Fatal(err)
			}
			return kib
		}
	}
	b.Fatal("no VmHWM")
	return 0
}
