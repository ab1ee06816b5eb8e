package repair

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"varve.dev/layout"
	"varve.dev/metadata"
)

// letGo makes every overlay that has the tree for a layer look its names up
// anew, and returns the containers that run on it. What was bad is in the
// directory bad by now.
//
// A mounted overlay keeps what it found when a name was first looked up;
// reconfiguring it, with nothing to change, drops what nobody holds
// (docs/design/0006). Whatever cannot be found out is left out: this is help
// for people, and the next start of a container needs none of it.
func (w *work) letGo(ctx context.Context, tree, bad string) []Container {
	mounts := overlaysOn(w.Root.Path(tree))
	done := map[string]bool{}
	for _, m := range mounts {
		if !done[m.device] {
			done[m.device] = m.reconfigure() == nil
		}
	}
	return w.containersOn(ctx, mounts, heldHandles(w.Root.Path(bad)))
}

// mounted is an overlay as one process sees it.
type mounted struct {
	pid    int
	at     string // from the process's root
	device string // of the overlay
	upper  string
}

// overlaysOn returns the overlays that have dir for a lower directory.
func overlaysOn(dir string) (found []mounted) {
	infos, _ := filepath.Glob("/proc/[0-9]*/mountinfo")
	for _, info := range infos {
		data, err := os.ReadFile(info)
		if err != nil || !bytes.Contains(data, []byte(dir)) {
			continue
		}
		pid, _ := strconv.Atoi(strings.Split(info, "/")[2])
		for line := range strings.Lines(string(data)) {
			if m, ok := parseMount(line, dir); ok {
				m.pid = pid
				found = append(found, m)
			}
		}
	}
	return found
}

// parseMount reads a line of mountinfo (proc_pid_mountinfo(5)) and tells
// whether it is an overlay on dir.
func parseMount(line, dir string) (m mounted, ok bool) {
	own, super, found := strings.Cut(line, " - ")
	f, s := strings.Fields(own), strings.Fields(super)
	if !found || len(f) < 5 || len(s) < 3 || s[0] != "overlay" {
		return m, false
	}
	m.device, m.at = f[2], unescape(f[4])
	for option := range strings.SplitSeq(s[2], ",") {
		key, value, _ := strings.Cut(option, "=")
		switch key {
		case "lowerdir", "lowerdir+":
			ok = ok || slices.Contains(strings.Split(unescape(value), ":"), dir)
		case "upperdir":
			m.upper = unescape(value)
		}
	}
	return m, ok
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// reconfigure drops the names that nobody holds.
func (m mounted) reconfigure() error {
	at := path.Join(fmt.Sprintf("/proc/%d/root", m.pid), m.at)
	var st unix.Statfs_t
	if err := unix.Statfs(at, &st); err != nil || st.Type != unix.OVERLAYFS_SUPER_MAGIC {
		return errors.Join(err, errors.New("something else is mounted there by now"))
	}
	fd, err := unix.Fspick(unix.AT_FDCWD, at, unix.FSPICK_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if m.upper == "" {
		if err := unix.FsconfigSetFlag(fd, "ro"); err != nil {
			return err
		}
	}
	return unix.FsconfigReconfigure(fd)
}

// containersOn returns the containers that the mounts belong to, with their
// processes that hold a file with one of the handles.
func (w *work) containersOn(ctx context.Context, mounts []mounted, bad []string) (out []Container) {
	byUpper := map[string]Container{}
	_ = w.DB.View(ctx, func(tx *metadata.Tx) error {
		return tx.Containers().Each("", func(id layout.ContainerID, c layout.ContainerRecord) error {
			if snap, err := tx.Snapshots().Get(c.Snapshot); err == nil {
				upper := w.Root.Path(path.Join(layout.ActivePath(snap.Layer), layout.TreeDir))
				byUpper[upper] = Container{ID: string(id), Name: c.Name}
			}
			return nil
		})
	})
	for upper, c := range byUpper {
		runs := false
		for _, m := range mounts {
			if m.upper != upper {
				continue
			}
			runs = true
			if !slices.Contains(c.PIDs, m.pid) && holds(m.pid, bad) {
				c.PIDs = append(c.PIDs, m.pid)
			}
		}
		if runs {
			slices.Sort(c.PIDs)
			out = append(out, c)
		}
	}
	slices.SortFunc(out, func(a, b Container) int { return strings.Compare(a.ID, b.ID) })
	return out
}

// heldHandles returns the file handles of the regular files below dir that
// somebody has open or mapped, as a refused lease tells.
func heldHandles(dir string) (handles []string) {
	_ = filepath.WalkDir(dir, func(name string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || d.Name() == layout.QuarantineNote {
			return nil
		}
		if h, ok := handleOf(name, 0); ok && isHeld(name) {
			handles = append(handles, h)
		}
		return nil
	})
	return handles
}

func isHeld(name string) bool {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return false
	}
	defer f.Close() // gives the lease back
	_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
	return errors.Is(err, unix.EAGAIN)
}

// atHandleFID asks for a handle that only identifies a file (Linux 6.5).
const atHandleFID = 0x200

func handleOf(name string, flags int) (string, bool) {
	h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, name, flags|atHandleFID)
	if err != nil {
		return "", false
	}
	return string(h.Bytes()), true
}

// holds tells whether a process has one of the files open, mapped or running:
// the handle that overlayfs gives ends in that of the file below.
func holds(pid int, bad []string) bool {
	if len(bad) == 0 {
		return false
	}
	for _, pattern := range []string{"fd/*", "map_files/*", "exe"} {
		names, _ := filepath.Glob(fmt.Sprintf("/proc/%d/%s", pid, pattern))
		for _, name := range names {
			h, ok := handleOf(name, unix.AT_SYMLINK_FOLLOW)
			if ok && slices.ContainsFunc(bad, func(b string) bool { return strings.HasSuffix(h, b) }) {
				return true
			}
		}
	}
	return false
}
