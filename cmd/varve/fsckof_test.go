package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"varve.dev/fsck/foreign"
	"varve.dev/internal/testkit"
)

// storeless is a host whose commands must not make or need a store.
func storeless(t *testing.T) *host {
	t.Helper()
	h := &host{t: t, bin: testkit.Binaries(t), root: filepath.Join(t.TempDir(), "none")}
	state := filepath.Join(t.TempDir(), "none")
	h.env = append(os.Environ(), "VARVE_ROOT="+h.root, "VARVE_STATE="+state)
	t.Cleanup(func() {
		for _, dir := range []string{h.root, state} {
			if _, err := os.Lstat(dir); !os.IsNotExist(err) {
				t.Errorf("%s: %v", dir, err)
			}
		}
	})
	return h
}

// checkOf runs fsck on somebody else's store.
func (h *host) checkOf(flag, root string, code int) (report foreign.Report) {
	h.t.Helper()
	cmd := h.command("fsck", flag, root, "--json")
	out, err := cmd.Output()
	if cmd.ProcessState.ExitCode() != code {
		h.t.Errorf("exit code %d, not %d: %v\n%.2000s", cmd.ProcessState.ExitCode(), code, err, out)
	}
	if err := json.Unmarshal(out, &report); err != nil {
		h.t.Fatalf("%v\n%s", err, out)
	}
	return report
}

func TestFsckOfLayout(t *testing.T) {
	h := storeless(t)
	img, err := testkit.Stacked(t, 3, 5).Copy(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	m, _ := testkit.ReadImage(t, img)
	if report := h.checkOf("--of-oci-layout", img.Dir, 0); len(report.Findings) > 0 || report.Blobs != 5 {
		t.Errorf("%+v", report)
	}
	if err := os.Truncate(testkit.BlobPath(img.Dir, m.Layers[0].Digest), 0); err != nil {
		t.Fatal(err)
	}
	report := h.checkOf("--of-oci-layout", img.Dir, 2)
	if len(report.Findings) != 1 || report.Findings[0].Kind != foreign.Empty || report.Counts[foreign.Empty] != 1 {
		t.Errorf("%+v", report)
	}
	out, code := h.try("fsck", "--of-oci-layout", img.Dir)
	for _, want := range []string{m.Layers[0].Digest.String() + " of " + img.Name, "empty", "0 bytes, must be", "repair: ", "loss (1 empty)"} {
		if !strings.Contains(out, want) {
			t.Errorf("the text lacks %q:\n%s", want, out)
		}
	}
	if code != 2 {
		t.Errorf("exit code %d", code)
	}
}

// What could not run ends with 3: 1 and 2 are answers.
func TestFsckOfNothing(t *testing.T) {
	h := storeless(t)
	dir := t.TempDir()
	for _, args := range [][]string{
		{"--of-oci-layout", dir}, {"--of-docker", dir}, {"--of-containerd", dir}, {"--of-docker", ""},
		{"--of-docker", dir, "--of-containerd", dir}, {"--of-oci-layout", dir, "--deep"}, {"--of-oci-layout", dir, "--list"},
	} {
		if out, code := h.try(append([]string{"fsck"}, args...)...); code != couldNotRun || !strings.HasPrefix(out, "varve: fsck") {
			t.Errorf("%q: exit code %d\n%s", args, code, out)
		}
	}
}

// varve's own archives are layouts.
func TestFsckOfWhatWasSaved(t *testing.T) {
	h := newHost(t)
	name := busybox(t)
	h.run("pull", name)
	archive := filepath.Join(t.TempDir(), "image.tar")
	h.run("save", "-o", archive, name)
	if report := h.checkOf("--of-oci-layout", archive, 0); len(report.Findings) > 0 || report.Images != 1 {
		t.Errorf("%+v", report)
	}
}
