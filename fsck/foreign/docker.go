package foreign

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// The folders of a dockerd that keeps its images itself, by the storage
// driver overlay2, as of every version since 1.13.
const (
	dockerRecords = "image/overlay2"
	dockerTrees   = "overlay2"
)

// dockerStore is a data root in memory.
type dockerStore struct {
	*checker
	records directory // image/overlay2
	trees   directory // overlay2
	images  map[digest.Digest]*dockerImage
	layers  map[digest.Digest]*dockerLayer // by ChainID
	// said is what the images' configs say of layers.
	said map[digest.Digest]chainLink
	// taken are the folders of trees that something names.
	taken map[string]bool
	// shifted says that a user namespace lies between the owners in layers
	// and those on disk.
	shifted bool
}

// chainLink is a layer in a chain.
type chainLink struct {
	diff   digest.Digest
	parent digest.Digest // ChainID; empty: it is the lowest
}

// docker checks a data root.
func (c *checker) docker() error {
	d := &dockerStore{
		checker: c, images: map[digest.Digest]*dockerImage{}, layers: map[digest.Digest]*dockerLayer{},
		said: map[digest.Digest]chainLink{}, taken: map[string]bool{},
	}
	if err := c.dockerRoot(); err != nil {
		return err
	}
	var err error
	if d.records, err = openDirectory(filepath.Join(c.opts.Root, dockerRecords)); err != nil {
		return err
	}
	defer d.records.close()
	if d.trees, err = openDirectory(filepath.Join(c.opts.Root, dockerTrees)); err != nil {
		return err
	}
	defer d.trees.close()
	d.owners()
	c.dockerInUse()
	for _, step := range []func() error{d.loadImages, d.loadLayers, d.loadContainers, d.compareLayers} {
		if err := errors.Join(step(), c.ctx.Err()); err != nil {
			return err
		}
	}
	d.leftovers()
	return nil
}

// remapped is the folder of a daemon with userns-remap, in its data root.
var remapped = regexp.MustCompile(`^[0-9]+\.[0-9]+$`)

// dockerRoot refuses what is no such data root, and says what it seems to be.
func (c *checker) dockerRoot() error {
	root := c.opts.Root
	if isDir(filepath.Join(root, dockerRecords)) {
		return nil
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	for _, e := range entries {
		if remapped.MatchString(e.Name()) {
			return fmt.Errorf("its dockerd runs in a user namespace: name %s: %w", filepath.Join(root, e.Name()), errdefs.ErrNotFound)
		}
	}
	if drivers, _ := os.ReadDir(filepath.Join(root, "image")); len(drivers) > 0 {
		return fmt.Errorf("its storage driver is %s, only overlay2 is known: %w", drivers[0].Name(), errdefs.ErrNotImplemented)
	}
	if own := filepath.Join(root, "containerd", "daemon"); isDir(own) {
		return fmt.Errorf("it has no %s: its dockerd keeps images in containerd, whose root is often %s or /var/lib/containerd: %w", dockerRecords, own, errdefs.ErrNotFound)
	}
	return fmt.Errorf("no data root of dockerd is there: it has no %s: %w", dockerRecords, errdefs.ErrNotFound)
}

// owners finds out whether the owners on disk are those in layers: a daemon in
// a user namespace is root to its containers and somebody else here.
func (d *dockerStore) owners() {
	var st unix.Stat_t
	err := unix.Stat(d.opts.Root, &st)
	d.shifted = remapped.MatchString(filepath.Base(filepath.Clean(d.opts.Root))) || err == nil && st.Uid != 0
	if d.shifted {
		d.add(Finding{Kind: Unchecked, Severity: layout.Notice, Object: "store", Detail: "its dockerd runs in a user namespace: owners of files are not compared"})
	}
}

// dockerInUse looks at the locks that a running dockerd holds on databases of
// its own.
func (c *checker) dockerInUse() {
	for _, name := range []string{"volumes/metadata.db", "buildkit/cache.db", "buildkit/snapshots.db", "network/files/local-kv.db"} {
		if locked(filepath.Join(c.opts.Root, name)) {
			c.add(Finding{
				Kind: InUse, Severity: layout.Notice, Object: "store", Path: name,
				Detail: "a dockerd has it locked: what it is changing now is reported wrongly", Repair: "stop it and check again",
			})
			return
		}
	}
}

// locked tells whether another process has an exclusive lock on a file.
func locked(name string) bool {
	fi, err := os.Lstat(name)
	if err != nil || !fi.Mode().IsRegular() {
		return false
	}
	f, err := os.Open(name)
	if err != nil {
		return false
	}
	defer f.Close() // which lets go of the lock
	return errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}

// digests lists those names in a folder of records that are digests: dockerd
// ignores the others, such as what it is removing.
func (d *dockerStore) digests(dir string) (out []digest.Digest, err error) {
	names, err := d.records.list(dir)
	for _, name := range names {
		if id := digest.NewDigestFromEncoded(digest.SHA256, name); id.Validate() == nil {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out, unavailable(err)
}

func unavailable(err error) error {
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	return nil
}

// compareLayers compares the layers with their trees, several at once.
func (d *dockerStore) compareLayers() error {
	for _, l := range d.layers {
		d.expect(l.size)
	}
	g, ctx := errgroup.WithContext(d.ctx)
	g.SetLimit(d.opts.Workers)
	for _, l := range d.layers {
		g.Go(func() error {
			if ctx.Err() == nil && l.cache != "" {
				d.compareLayer(l)
			}
			return ctx.Err()
		})
	}
	return g.Wait()
}

// ownTree matches the folders that dockerd itself makes: BuildKit, which has
// records of its own, names its otherwise.
var ownTree = regexp.MustCompile(`^[0-9a-f]{64}(-init)?$`)

// leftovers reports trees that nothing names, or whose record cannot be read.
func (d *dockerStore) leftovers() {
	names, _ := d.trees.list(".")
	slices.Sort(names)
	for _, name := range names {
		if ownTree.MatchString(name) && !d.taken[name] {
			d.unnamedTree(path.Join(dockerTrees, name), "diff")
		}
	}
}
