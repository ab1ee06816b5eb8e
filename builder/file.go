package builder

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/continuity/fs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/sys/user"
	copyfs "github.com/tonistiigi/fsutil/copy"

	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/overlay"
)

// fileStep is a file operation: a chain of actions on writable trees.
type fileStep struct {
	*step
	op      *pb.FileOp
	trees   []overlay.Tree // mounted in this order
	inputAt map[int]int    // input → place among trees, read-only
	target  []int          // action → place among trees, writable
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
	err = inMounts(t.j.b.Scratch, f.trees, func(dirs []string) error {
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
		var tree overlay.Tree
		if snap := f.inputs[in]; snap != "" {
			var err error
			if tree, err = f.j.b.Snaps.Tree(ctx, snap); err != nil {
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
		return f.missing(a.SecondaryInput, src, x.Copy, copyFiles(ctx, src, root, x.Copy, owner))
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

// missing says that the source of a copy is not there in the words that people,
// and what reads their builds' output, know from BuildKit, which finds out when
// it works out a cache key.
func (f *fileStep) missing(input int64, src string, c *pb.FileActionCopy, err error) error {
	if !errors.Is(err, os.ErrNotExist) || input >= int64(len(f.inputs)) {
		return err
	}
	if p, rootErr := fs.RootPath(src, c.Src); rootErr == nil {
		if _, statErr := os.Lstat(p); errors.Is(statErr, os.ErrNotExist) {
			return fmt.Errorf("failed to compute cache key: failed to calculate checksum of ref %s: %q: %w", f.inputs[input], filepath.Join("/", c.Src), errdefs.ErrNotFound)
		}
	}
	return err
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
