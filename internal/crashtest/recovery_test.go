package crashtest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"
	"unsafe"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"varve.dev/daemon"
	"varve.dev/durable"
	"varve.dev/internal/testkit"
	"varve.dev/journal"
	"varve.dev/layout"
	"varve.dev/metadata"
)

// TestRecoveryFollowsTheWork kills the same pull on a store of few images and
// on one of twenty times as many. Recovery opens, changes and commits the same
// on both: it looks at what was under way. A larger pull makes it more. What
// opening the database costs does grow, to a bound: see
// metadata.TestOpeningALargeDatabase.
func TestRecoveryFollowsTheWork(t *testing.T) {
	at := newPlace(t, 3, 10)
	at.registry.Push(t, testkit.Stacked(t, 12, 5), bigName)
	for _, point := range []string{layout.PointPublishDurable, layout.PointPublishLayer} {
		few, many := at.recovered(t, 10, stackedName, point), at.recovered(t, 200, stackedName, point)
		larger := at.recovered(t, 10, bigName, point)
		t.Logf("killed at %s:\n  10 images:  %v\n  200 images: %v\n  10 images and a larger pull: %v", point, few, many, larger)
		if few.work() != many.work() {
			t.Errorf("recovery of the same pull at %s: %v with 10 images, %v with 200", point, few, many)
		}
		if few.opened == 0 || few.changes == 0 || larger.changes <= few.changes {
			t.Errorf("nothing was counted at %s: %v, of a larger pull %v", point, few, larger)
		}
	}
}

// effort is what an opening did.
type effort struct {
	opened  int // files and directories of the store
	changes int // renames, removals and so on
	commits int
	read    int // bytes of the database and its log, when these were opened
	took    time.Duration
}

// work is what has to be the same.
func (e effort) work() effort {
	return effort{opened: e.opened, changes: e.changes, commits: e.commits}
}

func (e effort) String() string {
	return fmt.Sprintf("%d files and directories opened, %d changes, %d commits, in %v; the database was opened with %d bytes read",
		e.opened, e.changes, e.commits, e.took.Round(time.Microsecond), e.read)
}

// recovered kills a pull on a store of n images and counts the recovery.
func (p place) recovered(t *testing.T, n int, image, point string) (e effort) {
	t.Helper()
	dir := t.TempDir()
	must(t, p.fill(t, dir, n))
	w := p.worker("pull and die")
	w.Env = append(w.Env, killPoint+"="+point, killCount+"=1")
	w.Mark = func(string) {}
	if err := w.Run(dir, p.state, p.remote, image); err == nil {
		t.Fatalf("the pull passed %s", point)
	}
	w = p.worker("count recovery")
	w.Mark = func(line string) {
		_, err := fmt.Sscanf(line, "%d %d %d %d %d", &e.opened, &e.changes, &e.commits, &e.read, &e.took)
		must(t, err)
	}
	must(t, w.Run(dir))
	return e
}

// fill makes a store of n images of one small layer each.
func (p place) fill(t *testing.T, dir string, n int) error {
	t.Helper()
	l, err := testkit.NewLayout(t.TempDir())
	must(t, err)
	var images []ocispec.Descriptor
	for i := range n {
		small, err := l.AddLayer(testkit.Gzip, "", func(b *testkit.LayerBuilder) { b.Text("file", strconv.Itoa(i)) })
		must(t, err)
		desc, err := l.AddImage(ocispec.ImageConfig{}, small)
		must(t, err)
		images = append(images, named(desc, fmt.Sprintf("small-%d:1", i)))
	}
	file := filepath.Join(t.TempDir(), "archive.tar")
	must(t, archive(l.Dir, file, images...))
	f, err := os.Open(file)
	must(t, err)
	defer f.Close()
	e, err := daemon.Open(t.Context(), daemon.Options{Root: dir, State: p.state})
	must(t, err)
	_, err = e.Load(t.Context(), f, nil)
	return errors.Join(err, e.Close(context.Background()))
}

// pullAndDie pulls an image until it is killed at a fault point. args are those
// of place, and the image's name.
func pullAndDie(dir string, args []string, mark func(string, ...any)) error {
	ctx := context.Background()
	watchPoints(mark)
	e, err := daemon.Open(ctx, daemon.Options{Root: dir, State: args[0]})
	if err != nil {
		return err
	}
	w := &work{Engine: e, remote: args[1], mark: mark}
	return errors.Join(w.pull(args[2])(ctx), e.Close(ctx))
}

// countRecovery opens a store and tells the effort.
func countRecovery(dir string, _ []string, mark func(string, ...any)) error {
	root, err := durable.Open(dir)
	if err != nil {
		return err
	}
	before := bytesRead()
	db, err := metadata.Open(root, metadata.Options{})
	if err != nil {
		return err
	}
	e := effort{read: bytesRead() - before}
	opened, err := watchOpens(dir)
	if err != nil {
		return err
	}
	var changes changeCounter
	root.SetObserver(&changes)
	began := time.Now()
	j, _, err := journal.Open(context.Background(), root, db)
	if err != nil {
		return err
	}
	e.took = time.Since(began)
	// What recovery leaves to the sweeper is its work too.
	if err := j.Drain(context.Background()); err != nil {
		return err
	}
	names, err := opened()
	if err != nil {
		return err
	}
	n, _ := db.Commits()
	mark("%d %d %d %d %d", len(names), changes.add("")-1, n, e.read, e.took)
	return errors.Join(j.Close(), db.Close(), root.Close())
}

// changeCounter counts the changes of a store.
type changeCounter struct{ counter }

func (c *changeCounter) Observe(durable.Op) { c.add("") }

// bytesRead is how much this process has read by system calls.
func bytesRead() (n int) {
	data, err := os.ReadFile("/proc/self/io")
	if err == nil {
		_, err = fmt.Sscanf(string(data), "rchar: %d", &n)
	}
	if err != nil {
		panic(err)
	}
	return n
}

// watchOpens has the kernel tell which files and directories below dir are
// opened from now on. What it returns ends that, and says which. It needs a
// mount namespace of its own, as a worker has.
func watchOpens(dir string) (end func() ([]string, error), err error) {
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		return nil, fmt.Errorf("bind %s: %w", dir, err)
	}
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_UNLIMITED_QUEUE|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK, unix.O_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("fanotify: %w", err)
	}
	err = unix.FanotifyMark(fd, unix.FAN_MARK_ADD|unix.FAN_MARK_MOUNT, unix.FAN_OPEN|unix.FAN_ONDIR, unix.AT_FDCWD, dir)
	if err != nil {
		return nil, fmt.Errorf("fanotify mark: %w", err)
	}
	return func() ([]string, error) {
		defer unix.Close(fd)
		names := map[string]bool{}
		buf := make([]byte, 64<<10)
		for {
			n, err := unix.Read(fd, buf)
			if errors.Is(err, unix.EAGAIN) {
				return slices.Sorted(maps.Keys(names)), nil
			}
			if err != nil {
				return nil, fmt.Errorf("fanotify: %w", err)
			}
			for rest := buf[:n]; len(rest) > 0; {
				event := (*unix.FanotifyEventMetadata)(unsafe.Pointer(&rest[0]))
				name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", event.Fd))
				if err = errors.Join(err, unix.Close(int(event.Fd))); err != nil {
					return nil, err
				}
				names[name] = true
				rest = rest[event.Event_len:]
			}
		}
	}, nil
}
