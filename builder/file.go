package builder

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/continuity/fs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/sys/user"
	copyfs "github.com/tonistiigi/fsutil/copy"

	"varve.dev/errdefs"
	"varve.dev/layer"
	"varve.dev/layout"
	"varve.dev/snapshotter"
)

// fileStep is a file operation: a chain of actions on writable trees.
type fileStep struct {
	*step
	op      *pb.FileOp
	trees   []snapshotter.Tree // mounted in this order
	inputAt map[int]int        // input → place among trees, read-only
	target  []int              // action → place among trees, writable
	actives map[int]layout.SnapshotKey
}

// file carries out a file operation.
func (t *step) file(ctx context.Context, op *pb.FileOp) (out outputs, err error) {
	f := &fileStep{step: t, op: op, inputAt: map[int]int{}, actives: map[int]layout.SnapshotKey{}}
	var results []layout.SnapshotKey
	defer func() {
		for _, active := range f.actives {
			committed := false
			for _, r := range results {
				committed = committed || err == nil && r == active
			}
			if !committed {
				f.discard(active)
			}
		}
	}()
	if err := f.plan(ctx); err != nil {
		return out, err
	}
	err = inMounts(t.s.b.Scratch, f.trees, func(dirs []string) error {
		for i, a := range op.Actions {
			if err := f.act(ctx, dirs, i, a); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return out, err
	}
	byOutput := map[int64]layout.SnapshotKey{}
	for i, a := range op.Actions {
		if a.Output >= 0 {
			byOutput[a.Output] = f.actives[f.target[i]]
		}
	}
	for i := range int64(len(byOutput)) {
		active, ok := byOutput[i]
		if !ok {
			return out, fmt.Errorf("the operation has no output %d: %w", i, errdefs.ErrInvalidArgument)
		}
		results = append(results, active)
	}
	return t.commit(ctx, results)
}

// plan prepares a writable tree for each chain of actions and finds the inputs
// that are only read. An action works on an input or on what the action before
// it made.
func (f *fileStep) plan(ctx context.Context) error {
	taken := map[int]bool{}
	for i, a := range f.op.Actions {
		from := int(a.Input) - len(f.inputs)
		if from >= 0 {
			if from >= i || taken[from] {
				return fmt.Errorf("action %d works on what action %d has passed on already: %w", i, from, errdefs.ErrNotImplemented)
			}
			taken[from] = true
			f.target = append(f.target, f.target[from])
		} else {
			var on layout.SnapshotKey
			if a.Input >= 0 {
				on = f.inputs[a.Input]
			}
			active, tree, err := f.prepare(ctx, on)
			if err != nil {
				return err
			}
			f.actives[len(f.trees)] = active
			f.target = append(f.target, len(f.trees))
			f.trees = append(f.trees, tree)
		}
		if err := f.reads(ctx, a); err != nil {
			return err
		}
	}
	return nil
}

// reads mounts the inputs that an action looks into.
func (f *fileStep) reads(ctx context.Context, a *pb.FileAction) error {
	wanted := []int64{}
	if a.GetCopy() != nil {
		wanted = append(wanted, a.SecondaryInput)
	}
	for _, o := range owners(a) {
		if n := o.GetByName(); n != nil {
			wanted = append(wanted, n.Input)
		}
	}
	for _, in := range wanted {
		if in < 0 || int(in) >= len(f.inputs) {
			continue
		}
		if _, ok := f.inputAt[int(in)]; ok {
			continue
		}
		var tree snapshotter.Tree
		if snap := f.inputs[in]; snap != "" {
			var err error
			if tree, err = f.s.b.Snaps.Tree(ctx, snap); err != nil {
				return err
			}
		}
		f.inputAt[int(in)] = len(f.trees)
		f.trees = append(f.trees, tree)
	}
	return nil
}

// chown returns an action's owner.
func chown(a *pb.FileAction) *pb.ChownOpt {
	switch x := a.Action.(type) {
	case *pb.FileAction_Copy:
		return x.Copy.Owner
	case *pb.FileAction_Mkfile:
		return x.Mkfile.Owner
	case *pb.FileAction_Mkdir:
		return x.Mkdir.Owner
	case *pb.FileAction_Symlink:
		return x.Symlink.Owner
	}
	return nil
}

func owners(a *pb.FileAction) []*pb.UserOpt {
	c := chown(a)
	return []*pb.UserOpt{c.GetUser(), c.GetGroup()}
}

// at is the directory of an input or of an earlier action's tree.
func (f *fileStep) at(dirs []string, input int64) (string, error) {
	if input >= int64(len(f.inputs)) && int(input)-len(f.inputs) < len(f.target) {
		return dirs[f.target[int(input)-len(f.inputs)]], nil
	}
	if place, ok := f.inputAt[int(input)]; ok {
		return dirs[place], nil
	}
	return "", fmt.Errorf("the operation has no input %d: %w", input, errdefs.ErrInvalidArgument)
}

// act carries out one action. Paths in errors are those of the container.
func (f *fileStep) act(ctx context.Context, dirs []string, i int, a *pb.FileAction) (err error) {
	root := dirs[f.target[i]]
	defer func() { err = inContainer(err, dirs) }()
	owner, err := f.owner(dirs, a)
	if err != nil {
		return err
	}
	switch x := a.Action.(type) {
	case *pb.FileAction_Copy:
		src, err := f.at(dirs, a.SecondaryInput)
		if err != nil {
			return err
		}
		return copyFiles(ctx, src, root, x.Copy, owner)
	case *pb.FileAction_Mkdir:
		return makeDir(root, x.Mkdir, owner)
	case *pb.FileAction_Mkfile:
		return makeFile(root, x.Mkfile, owner)
	case *pb.FileAction_Symlink:
		return makeLink(root, x.Symlink, owner)
	case *pb.FileAction_Rm:
		return remove(root, x.Rm)
	}
	return fmt.Errorf("file action %T is not known here: %w", a.Action, errdefs.ErrNotImplemented)
}

// inContainer takes mount points out of an error's text and gives it a kind.
func inContainer(err error, dirs []string) error {
	if err == nil || errdefs.Has(err) {
		return err
	}
	text := err.Error()
	for _, d := range dirs {
		text = strings.ReplaceAll(text, d, "")
	}
	kind := error(errdefs.ErrFailedPrecondition)
	if errors.Is(err, os.ErrNotExist) || strings.Contains(text, "not found") {
		kind = errdefs.ErrNotFound
	}
	return fmt.Errorf("%s: %w", text, kind)
}

// owner looks an action's owner up, by name in the tree that the name is from.
func (f *fileStep) owner(dirs []string, a *pb.FileAction) (copyfs.Chowner, error) {
	c := chown(a)
	if c == nil {
		return func(old *copyfs.User) (*copyfs.User, error) {
			if old == nil {
				return &copyfs.User{}, nil // what is made here is root's
			}
			return old, nil
		}, nil
	}
	var u copyfs.User
	if err := f.lookup(dirs, c.User, "/etc/passwd", &u, true); err != nil {
		return nil, err
	}
	if c.Group != nil {
		if err := f.lookup(dirs, c.Group, "/etc/group", &u, false); err != nil {
			return nil, err
		}
	}
	return func(*copyfs.User) (*copyfs.User, error) { return &u, nil }, nil
}

func (f *fileStep) lookup(dirs []string, o *pb.UserOpt, file string, u *copyfs.User, isUser bool) error {
	if n := o.GetByName(); n != nil {
		dir, err := f.at(dirs, n.Input)
		if err != nil {
			return err
		}
		name, err := fs.RootPath(dir, file)
		if err != nil {
			return err
		}
		found := false
		if isUser {
			list, err := user.ParsePasswdFileFilter(name, func(x user.User) bool { return x.Name == n.Name })
			if err == nil && len(list) > 0 {
				u.UID, u.GID, found = list[0].Uid, list[0].Gid, true
			}
		} else {
			list, err := user.ParseGroupFileFilter(name, func(x user.Group) bool { return x.Name == n.Name })
			if err == nil && len(list) > 0 {
				u.GID, found = list[0].Gid, true
			}
		}
		if !found {
			return fmt.Errorf("%s has no %q: %w", file, n.Name, errdefs.ErrNotFound)
		}
		return nil
	}
	if o == nil {
		return nil
	}
	id := int(o.GetByID())
	if isUser {
		u.UID, u.GID = id, id
	} else {
		u.GID = id
	}
	return nil
}

// times turns an action's time into what copy takes; nil leaves times alone.
func times(ns int64) *time.Time {
	if ns == -1 {
		return nil
	}
	t := time.Unix(0, ns)
	return &t
}

func makeDir(root string, a *pb.FileActionMkDir, owner copyfs.Chowner) error {
	p, err := fs.RootPath(root, filepath.Join("/", a.Path))
	if err != nil {
		return err
	}
	if a.MakeParents {
		_, err = copyfs.MkdirAll(p, os.FileMode(a.Mode)&0o777, owner, times(a.Timestamp))
		return err
	}
	if err := os.Mkdir(p, os.FileMode(a.Mode)&0o777); err != nil {
		if errors.Is(err, os.ErrExist) {
			return nil
		}
		return err
	}
	return dress(p, owner, a.Timestamp)
}

func dress(p string, owner copyfs.Chowner, ns int64) error {
	if err := copyfs.Chown(p, nil, owner); err != nil {
		return err
	}
	return copyfs.Utimes(p, times(ns))
}

func makeFile(root string, a *pb.FileActionMkFile, owner copyfs.Chowner) error {
	p, err := fs.RootPath(root, filepath.Join("/", a.Path))
	if err != nil {
		return err
	}
	// What stands there goes first: a device node must never be written to.
	if fi, err := os.Lstat(p); err == nil && !fi.IsDir() {
		if err := os.Remove(p); err != nil {
			return err
		}
	}
	f, err := os.OpenFile(p, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(a.Data)
	if err = errors.Join(err, f.Chmod(os.FileMode(a.Mode)&0o777), f.Close()); err != nil {
		return err
	}
	return dress(p, owner, a.Timestamp)
}

func makeLink(root string, a *pb.FileActionSymlink, owner copyfs.Chowner) error {
	p, err := fs.RootPath(root, filepath.Join("/", a.Newpath))
	if err != nil {
		return err
	}
	if err := os.Symlink(a.Oldpath, p); err != nil {
		return err
	}
	return dress(p, owner, a.Timestamp)
}

func remove(root string, a *pb.FileActionRm) error {
	names := []string{filepath.Join("/", a.Path)}
	if a.AllowWildcard {
		var err error
		if names, err = copyfs.ResolveWildcards(root, strings.TrimPrefix(names[0], "/"), false); err != nil {
			return err
		}
	}
	for _, name := range names {
		dir, base := filepath.Split(filepath.Join("/", name))
		if base == "" {
			return fmt.Errorf("the root cannot be removed: %w", errdefs.ErrInvalidArgument)
		}
		dir, err := fs.RootPath(root, dir)
		if err != nil {
			return err
		}
		p := filepath.Join(dir, base)
		if _, err := os.Lstat(p); err != nil && !a.AllowNotFound {
			return err
		}
		if err := os.RemoveAll(p); err != nil {
			return err
		}
	}
	return nil
}

func copyFiles(ctx context.Context, src, dst string, a *pb.FileActionCopy, owner copyfs.Chowner) error {
	if !a.CreateDestPath {
		p, err := fs.RootPath(dst, filepath.Join("/", a.Dest))
		if err != nil {
			return err
		}
		if _, err := os.Lstat(filepath.Dir(p)); err != nil {
			return err
		}
	}
	// A slash at the end says that the destination is a directory.
	to := keepSlash(a.Dest)
	names := []string{keepSlash(a.Src)}
	if a.AllowWildcard {
		var err error
		if names, err = copyfs.ResolveWildcards(src, names[0], a.FollowSymlink); err != nil {
			return err
		}
		if len(names) == 0 {
			if a.AllowEmptyWildcard {
				return nil
			}
			return fmt.Errorf("%s: nothing matches: %w", a.Src, errdefs.ErrNotFound)
		}
	}
	options := copyOptions(a, owner)
	for _, name := range names {
		if a.AttemptUnpackDockerCompatibility {
			done, err := unpack(ctx, src, name, dst, to)
			if err != nil {
				return err
			}
			if done {
				continue
			}
		}
		if err := copyfs.Copy(ctx, src, name, dst, to, options); err != nil {
			return err
		}
	}
	return nil
}

func copyOptions(a *pb.FileActionCopy, owner copyfs.Chowner) copyfs.Opt {
	return func(c *copyfs.CopyInfo) {
		c.IncludePatterns, c.ExcludePatterns = a.IncludePatterns, a.ExcludePatterns
		c.Chown, c.Utime = owner, times(a.Timestamp)
		if a.ModeStr != "" {
			c.ModeStr = a.ModeStr
		} else if m := int(a.Mode); m != -1 {
			c.Mode = &m
		}
		c.CopyDirContents, c.FollowLinks = a.DirCopyContents, a.FollowSymlink
		c.AlwaysReplaceExistingDestPaths = a.AlwaysReplaceExistingDestPaths
	}
}

// keepSlash cleans a path and keeps what its end says: "dir/" is a directory,
// "dir/." what is in it.
func keepSlash(p string) string {
	clean := filepath.Join("/", p)
	end := ""
	switch {
	case strings.HasSuffix(p, "/."):
		end = "/."
	case strings.HasSuffix(p, "/"):
		end = "/"
	}
	if clean == "/" {
		return clean + strings.TrimPrefix(end, "/")
	}
	return clean + end
}

// unpack extracts name into the directory to if it is an archive, compressed
// or not, as ADD does, and tells whether it was one.
func unpack(ctx context.Context, src, name, dst, to string) (bool, error) {
	p, err := fs.RootPath(src, name)
	if err != nil {
		return false, err
	}
	fi, err := os.Stat(p)
	if err != nil || !fi.Mode().IsRegular() {
		return false, nil // not an archive; the copy says what is wrong
	}
	f, err := os.Open(p)
	if err != nil {
		return false, err
	}
	defer f.Close()
	if !layer.IsArchive(f) {
		return false, nil
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return false, err
	}
	dir, err := fs.RootPath(dst, filepath.Join("/", to))
	if err != nil {
		return false, err
	}
	if _, err := copyfs.MkdirAll(dir, 0o755, nil, nil); err != nil {
		return false, err
	}
	stream, _, err := layer.Decompress(f)
	if err != nil {
		return false, err
	}
	defer stream.Close()
	// An archive's own file called .wh.something is a file like others.
	asItIs := archive.WithConvertWhiteout(func(*tar.Header, string) (bool, error) { return true, nil })
	_, err = archive.Apply(ctx, dir, stream, asItIs)
	return true, err
}

// copyLocal brings a local source into the store, as root's.
func (t *step) copyLocal(ctx context.Context, local *localTree) (outputs, error) {
	active, tree, err := t.prepare(ctx, "")
	if err != nil {
		return outputs{}, err
	}
	for _, f := range local.files {
		if err := ctx.Err(); err != nil {
			t.discard(active)
			return outputs{}, err
		}
		if err := copyOne(local.dir, tree.Upper, f); err != nil {
			t.discard(active)
			return outputs{}, fmt.Errorf("build context: %w: %w", err, errdefs.ErrUnavailable)
		}
	}
	return t.commit(ctx, []layout.SnapshotKey{active})
}

func copyOne(from, to string, f localFile) error {
	dst := filepath.Join(to, f.name)
	mode := os.FileMode(f.stat.Mode)
	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		return err
	}
	switch {
	case mode.IsDir():
		if err := os.Mkdir(dst, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	case mode&os.ModeSymlink != 0:
		return os.Symlink(f.stat.Linkname, dst)
	case mode.IsRegular():
		if err := copyRegular(filepath.Join(from, f.name), dst); err != nil {
			return err
		}
	default:
		return nil // devices and fifos of a checkout mean nothing in an image
	}
	if err := os.Chmod(dst, mode&(os.ModePerm|os.ModeSetuid|os.ModeSetgid|os.ModeSticky)); err != nil {
		return err
	}
	mtime := time.Unix(0, f.stat.ModTime)
	return os.Chtimes(dst, mtime, mtime)
}

func copyRegular(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
