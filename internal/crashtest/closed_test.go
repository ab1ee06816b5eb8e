package crashtest

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"varve.dev/daemon"
	"varve.dev/fsck"
	"varve.dev/layout"
	"varve.dev/runtime"
)

// closed returns what is wrong with the closed store: what the witness finds,
// what an operation has left behind, and what du finds that the records do not
// account for. recovered tells that its last owner found it after a kill.
func (m *machine) closed(level layout.Level, recovered bool) (wrong []string) {
	report, err := fsck.Run(context.Background(), fsck.Options{Root: m.root, Level: level})
	if err != nil {
		return []string{err.Error()}
	}
	for _, f := range report.Findings {
		wrong = append(wrong, fmt.Sprintf("finding %s %s %s at %q: %s", f.Invariant, f.Severity, f.Object, f.Path, f.Detail))
	}
	r, err := readRecords(m.root)
	if err != nil {
		return append(wrong, err.Error())
	}
	wrong = append(wrong, underWay(r)...)
	wrong = append(wrong, leftovers(m.root)...)
	if recovered {
		wrong = append(wrong, useless(m.root, r)...)
	}
	wrong = append(wrong, m.told.settleContainers(m.root, r)...)
	return append(wrong, m.unaccounted(r)...)
}

// underWay are the records of operations: a closed store has none.
func underWay(r records) (wrong []string) {
	for id, rec := range r.leases {
		wrong = append(wrong, fmt.Sprintf("lease %s (%s) of nobody", id, rec.Purpose))
	}
	for id, rec := range r.intents {
		wrong = append(wrong, fmt.Sprintf("intent %s (%s) of nobody", id, rec.Purpose))
	}
	for id, rec := range r.sweeps {
		wrong = append(wrong, fmt.Sprintf("sweep %s of %s is not carried out", id, rec.Node))
	}
	for key, rec := range r.snapshots {
		if rec.Kind != layout.SnapshotCommitted && !strings.HasPrefix(key, "container:") {
			wrong = append(wrong, "the snapshot of a step that has ended: "+key)
		}
	}
	return wrong
}

// leftovers are names that no operation needs any more. Unfinished blobs may
// stay as long as a pull of them would go on from there.
func leftovers(root string) (wrong []string) {
	eachIngest(root, func(name string, rec layout.IngestRecord, err error) {
		if err != nil || rec.Ref != "blob-"+string(rec.Expected) {
			wrong = append(wrong, fmt.Sprintf("an unfinished blob that no pull takes up: %s %s, %v", name, rec.Ref, err))
		}
	})
	for _, dir := range []string{layout.TrashDir, layout.StagingDir, layout.VolumesDir, layout.QuarantineDir} {
		each(root, dir, func(name string) { wrong = append(wrong, "left: "+dir+"/"+name) })
	}
	each(root, layout.CacheMountDir, func(name string) {
		if strings.HasSuffix(name, layout.CacheMountBegun) {
			wrong = append(wrong, "a cache mount that was never finished: "+name)
		}
	})
	each(root, ".", func(name string) {
		if strings.HasPrefix(name, ".tmp-") || name == layout.DamagedFile || name == layout.SuspectFile {
			wrong = append(wrong, "left: "+name)
		}
	})
	each(root, layout.ContainersDir, func(id string) {
		each(root, layout.ContainersDir+"/"+id, func(name string) {
			if !slices.Contains([]string{layout.ContainerConfig, layout.ContainerImage, layout.ContainerLock, "exit.json", "rootfs"}, name) {
				wrong = append(wrong, "left of container "+id+": "+name)
			}
		})
	})
	return wrong
}

// useless are unfinished blobs that have come another way. The next opening of
// the store removes them.
func useless(root string, r records) (wrong []string) {
	eachIngest(root, func(name string, rec layout.IngestRecord, _ error) {
		if _, recorded := r.blobs[string(rec.Expected)]; recorded {
			wrong = append(wrong, fmt.Sprintf("an unfinished blob that is in the store: %s %s", name, rec.Ref))
		}
	})
	return wrong
}

func eachIngest(root string, fn func(name string, rec layout.IngestRecord, err error)) {
	each(root, layout.IngestDir, func(name string) {
		var rec layout.IngestRecord
		data, err := os.ReadFile(filepath.Join(root, layout.IngestDir, name, layout.IngestInfo))
		if err == nil {
			err = json.Unmarshal(data, &rec)
		}
		fn(name, rec, err)
	})
}

// each calls fn with the names in a directory of the store.
func each(root, dir string, fn func(name string)) {
	entries, err := os.ReadDir(filepath.Join(root, dir))
	if err != nil {
		fn(err.Error())
	}
	for _, e := range entries {
		fn(e.Name())
	}
}

// unaccounted compares du with what the records say. At the moment at which the
// file system gives what was written last its place, it counts that twice or not
// at all: a difference counts that stays.
func (m *machine) unaccounted(r records) []string {
	for tries := 0; ; tries++ {
		a, err := accountOf(m.root, r)
		if err != nil {
			return []string{err.Error()}
		}
		n, err := du(m.root)
		if err != nil {
			return []string{err.Error()}
		}
		if a.bytes <= n && n <= a.bytes+a.rounding {
			m.supplies.gap.note(n, a)
			return nil
		}
		if tries == 20 {
			return []string{fmt.Sprintf("du finds %d bytes, the records account for %d and at most %d of rounding", n, a.bytes, a.rounding)}
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// outside are what killed processes have left on the machine: processes,
// mounts, cgroups, and files in the state directory.
func (m *machine) outside() (found []string) {
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		found = slices.Concat(m.processes(), m.inState(), m.mounts(), m.leftCgroups())
		if len(found) == 0 || time.Now().After(deadline) {
			return found
		}
	}
}

// processes are those that run this machine's binaries.
func (m *machine) processes() (found []string) {
	exes, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, exe := range exes {
		if target, err := os.Readlink(exe); err == nil && strings.HasPrefix(target, m.bin+"/") {
			line, _ := os.ReadFile(filepath.Join(filepath.Dir(exe), "cmdline"))
			found = append(found, fmt.Sprintf("a process runs on: %s %s", exe, strings.ReplaceAll(string(line), "\x00", " ")))
		}
	}
	return found
}

// inState are files of --state. The socket of a daemon that was killed is
// replaced by the next daemon's.
func (m *machine) inState() (found []string) {
	entries, err := os.ReadDir(m.state)
	if err != nil {
		return []string{err.Error()}
	}
	for _, e := range entries {
		if e.Name() != daemon.DaemonSocket {
			found = append(found, "in the state directory: "+e.Name())
		}
	}
	return found
}

// mounts are those of this machine that everybody sees.
func (m *machine) mounts() (found []string) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return []string{err.Error()}
	}
	for line := range strings.Lines(string(data)) {
		if strings.Contains(line, m.dir) {
			found = append(found, "mounted: "+line)
		}
	}
	return found
}

// cgroupDir is where the shim makes a container's cgroup, in one hierarchy or
// in each.
const cgroupDir = "varve"

// noteCgroups remembers the containers and steps whose shims run.
func (m *machine) noteCgroups() {
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, l := range lines {
		data, err := os.ReadFile(l)
		args := strings.Split(strings.TrimSuffix(string(data), "\x00"), "\x00")
		if err != nil || args[0] != m.shim {
			continue
		}
		if spec, err := runtime.Load(args[len(args)-1]); err == nil {
			m.cgroups[spec.ID] = true
		}
	}
}

func (m *machine) leftCgroups() (found []string) {
	for id := range m.cgroups {
		for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
			left, _ := filepath.Glob(pattern + cgroupDir + "/" + id)
			for _, l := range left {
				found = append(found, "a cgroup is left: "+l)
			}
		}
	}
	return found
}
