package repair

import (
	"context"
	"encoding/hex"
	"errors"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"varve.dev/fsck/reach"
	"varve.dev/layer"
	"varve.dev/layout"
)

// change is what has to be done to one entry of a layer's file manifest.
type change struct {
	want *layer.Entry
	// names have to be given to a new file: all of the entry's, or those
	// that stand for something else.
	names []string
	// good is a name that stands for the right file already; "" if none does
	// and the file has to be made.
	good string
	// dress tells that the attributes of what stands there have to be set.
	dress bool
}

// needsContents tells whether a regular file has to be found again.
func (c *change) needsContents() bool {
	return c.good == "" && len(c.names) > 0 && c.want.Mode&unix.S_IFMT == unix.S_IFREG && c.want.Size > 0
}

// compare holds a tree against its file manifest and returns what has to be
// done, directories first and from the top, and what has to be taken out. The
// contents of a file are read, from the disk, if suspect says so, or if the
// size tells that they are wrong.
func compare(ctx context.Context, dir string, want *layer.Manifest, suspect func(name string) bool) (changes []*change, extra []string, err error) {
	wants := byName(want)
	disk := reach.NewReader()
	got, err := layer.Walk(ctx, dir, layer.WalkOptions{Known: func(name string) (string, bool) {
		w := wants[name]
		if w == nil {
			return "", false
		}
		if !suspect(name) {
			return w.SHA256, true
		}
		sum, err := sumOf(ctx, disk, path.Join(dir, name), w.SHA256)
		return sum, err == nil
	}})
	if os.IsNotExist(err) {
		got, err = &layer.Manifest{}, nil
	}
	if err != nil {
		return nil, nil, err
	}
	there := byName(got)
	var files []*change
	for i := range want.Entries {
		c := compareEntry(&want.Entries[i], wants, there)
		switch {
		case c == nil:
		case c.want.Mode&unix.S_IFMT == unix.S_IFDIR:
			changes = append(changes, c)
		default:
			files = append(files, c)
		}
	}
	changes = append(changes, files...)
	for _, name := range slices.Sorted(maps.Keys(there)) {
		if wants[name] != nil {
			continue
		}
		if n := len(extra); n > 0 && strings.HasPrefix(name, extra[n-1]+"/") {
			continue // goes with the directory
		}
		extra = append(extra, name)
	}
	return changes, extra, nil
}

// sumOf returns the hash of what a file has on the disk. If that is what it has
// to be, want, the machine is made to forget what else it has of it in memory;
// if somebody keeps that, or the disk does not give the bytes, the file has no
// hash: another has to take its place. If it is not, what memory has may be the
// last good copy.
func sumOf(ctx context.Context, disk *reach.Reader, file, want string) (string, error) {
	for range 2 {
		hash := layout.Algorithm.Hash()
		err := disk.Read(ctx, unix.AT_FDCWD, file, func(piece []byte) error {
			_, err := hash.Write(piece)
			return err
		})
		sum := hex.EncodeToString(hash.Sum(nil))
		switch {
		case err == nil, errors.Is(err, reach.ErrMemory) && sum != want:
			return sum, nil
		case errors.Is(err, unix.EIO):
			return "", nil
		case !errors.Is(err, reach.ErrMemory):
			return "", err
		}
		if err := reach.Forget(unix.AT_FDCWD, file); err != nil {
			return "", err
		}
	}
	return "", nil
}

func byName(m *layer.Manifest) map[string]*layer.Entry {
	out := map[string]*layer.Entry{}
	for i := range m.Entries {
		for _, n := range m.Entries[i].Names {
			out[n] = &m.Entries[i]
		}
	}
	return out
}

// compareEntry returns nil for an entry that is as it has to be. Of several
// names, one that stands for the right contents in a file of this entry alone
// is kept, and the others are made names of that file.
func compareEntry(want *layer.Entry, wants, there map[string]*layer.Entry) *change {
	c := &change{want: want}
	var kept *layer.Entry
	for _, name := range want.Names {
		got := there[name]
		switch {
		case got != nil && got == kept:
		case got != nil && kept == nil && sameObject(want, got) && ours(want, got, wants):
			kept, c.good = got, name
		default:
			c.names = append(c.names, name)
		}
	}
	c.dress = kept != nil && !sameAttributes(want, kept)
	if len(c.names) == 0 && !c.dress {
		return nil
	}
	return c
}

// ours tells whether no name of the file that stands there belongs to another
// entry.
func ours(want, got *layer.Entry, wants map[string]*layer.Entry) bool {
	return !slices.ContainsFunc(got.Names, func(n string) bool { return wants[n] != nil && wants[n] != want })
}

// sameObject compares what cannot be set in place.
func sameObject(a, b *layer.Entry) bool {
	return a.Mode&unix.S_IFMT == b.Mode&unix.S_IFMT && a.Size == b.Size && a.SHA256 == b.SHA256 && a.Target == b.Target && a.Rdev == b.Rdev
}

func sameAttributes(a, b *layer.Entry) bool {
	return a.Mode == b.Mode && a.UID == b.UID && a.GID == b.GID && a.MTime == b.MTime && maps.Equal(a.Xattrs, b.Xattrs)
}
