package main

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/moby/buildkit/util/disk"

	"varve.dev/gc"
)

// What buildkitd.toml says of garbage is understood as buildkitd does.
func TestBuildkitdLimits(t *testing.T) {
	const gb = 1000 * 1000 * 1000
	for name, c := range map[string]struct {
		text string
		want gc.Limits
	}{
		"numbers":               {"maxUsedSpace = 5000\nminFreeSpace = 70\n", gc.Limits{Cache: 5000, Free: 70}},
		"sizes":                 {"maxUsedSpace = \"2GB\"\nreservedSpace = \"1GB\"\n", gc.Limits{Cache: 2 << 30}},
		"share of the disk":     {"maxUsedSpace = \"1%\"\n", gc.Limits{Cache: onePercent(t)}},
		"old name":              {"gckeepstorage = \"3GB\"\n", gc.Limits{Cache: 3 << 30}},
		"off":                   {"gc = false\nmaxUsedSpace = \"2GB\"\n", gc.Limits{}},
		"policies":              {"maxUsedSpace = 1\n[[worker.oci.gcpolicy]]\n  filters = [\"type==exec.cachemount\"]\n  maxUsedSpace = 100\n[[worker.oci.gcpolicy]]\n  keepDuration = \"48h\"\n[[worker.oci.gcpolicy]]\n  all = true\n  maxUsedSpace = \"1GB\"\n  reservedSpace = 5\n", gc.Limits{Cache: 1 << 30, CacheAge: 48 * time.Hour}},
		"the policy's old name": {"[[worker.oci.gcpolicy]]\n  keepBytes = 500\n", gc.Limits{Cache: 500}},
	} {
		got := limitsOf(t, c.text)
		if !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %+v, and should be %+v", name, got, c.want)
		}
	}
	if l := limitsOf(t, ""); l.Cache <= 0 || l.Cache > 100*gb || l.Free != 0 {
		t.Errorf("where nothing is said: %+v", l)
	}
}

// onePercent of the disk, as buildkitd has it: the next number of GB.
func onePercent(t *testing.T) int64 {
	t.Helper()
	d, err := disk.GetDiskStat(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return (d.Total/100>>30 + 1) * 1e9
}

func limitsOf(t *testing.T, text string) gc.Limits {
	t.Helper()
	path := filepath.Join(t.TempDir(), "buildkitd.toml")
	if err := os.WriteFile(path, []byte("[worker.oci]\n"+text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := readBuildkitd(path)
	if err != nil {
		t.Fatal(err)
	}
	l, err := c.Worker.OCI.limits(filepath.Join(t.TempDir(), "not", "there"))
	if err != nil {
		t.Fatal(err)
	}
	return l
}
