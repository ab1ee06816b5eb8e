package builder

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"golang.org/x/sys/unix"

	"varve.dev/internal/testkit"
	"varve.dev/internal/teststore"
	"varve.dev/layer"
	"varve.dev/layout"
	"varve.dev/overlay"
)

// newBuilder returns a builder on a store of its own, which is checked when
// the test ends. It runs no commands.
func newBuilder(t *testing.T) *Builder {
	t.Helper()
	testkit.NeedRoot(t)
	o := teststore.New(t)
	return New(Config{Root: o.Root, DB: o.DB, Journal: o.Journal, Blobs: o.Blobs, Snaps: o.Snaps, Scratch: t.TempDir()})
}

// begun returns a build that ends with the test.
func begun(t *testing.T, b *Builder) *job {
	t.Helper()
	return begunFor(t, b, Request{})
}

func begunFor(t *testing.T, b *Builder, req Request) *job {
	t.Helper()
	j, err := b.begin(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(j.end)
	return j
}

// tally counts the vertices of a build that are over.
type tally struct{ ran, cached int }

func (n *tally) tell(s *client.SolveStatus) {
	for _, v := range s.Vertexes {
		switch {
		case v.Completed == nil:
		case v.Cached:
			n.cached++
		default:
			n.ran++
		}
	}
}

// made is when everything in these tests was made.
var made = time.Unix(1_000_000_000, 0)

func loaded(t *testing.T, st llb.State) *graph {
	t.Helper()
	def, err := st.Marshal(t.Context(), llb.LinuxAmd64)
	if err != nil {
		t.Fatal(err)
	}
	g, err := loadGraph(def.ToPB())
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func solved(t *testing.T, j *job, st llb.State) layout.SnapshotKey {
	t.Helper()
	g := loaded(t, st)
	key, err := j.solve(t.Context(), g, g.root)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// shown describes what a container on a snapshot would see.
func shown(t *testing.T, b *Builder, key layout.SnapshotKey) *layer.Manifest {
	t.Helper()
	if key == "" {
		return &layer.Manifest{}
	}
	tree, err := b.Snaps.Tree(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	var m *layer.Manifest
	err = inMounts(b.Scratch, []overlay.Tree{tree}, func(dirs []string) (err error) {
		m, err = layer.Walk(context.Background(), dirs[0], layer.WalkOptions{})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// lines lists a tree, without the times of directories.
func lines(m *layer.Manifest) (out []string) {
	for _, e := range m.Entries {
		if e.Names[0] == "." {
			continue
		}
		when := e.MTime
		if e.Mode&unix.S_IFMT == unix.S_IFDIR {
			when = 0
		}
		out = append(out, fmt.Sprintf("%s %o %d:%d %d %.8s %s %v %d", strings.Join(e.Names, "="), e.Mode, e.UID, e.GID, e.Size, e.SHA256, e.Target, e.Xattrs, when))
	}
	return out
}

// names lists a tree by name alone.
func names(m *layer.Manifest) (out []string) {
	for _, e := range m.Entries {
		out = append(out, e.Names...)
	}
	slices.Sort(out)
	return slices.DeleteFunc(out, func(n string) bool { return n == "." })
}

// scribbler changes trees at random, and knows what is in them.
type scribbler struct {
	pick  *rand.Rand
	isDir map[string]bool // by name
}

func newScribbler(seed uint64) *scribbler {
	return &scribbler{rand.New(rand.NewPCG(seed, seed)), map[string]bool{"": true}}
}

// fork is a scribbler that goes on from here by itself.
func (s *scribbler) fork(seed uint64) *scribbler {
	f := newScribbler(seed)
	for n, dir := range s.isDir {
		f.isDir[n] = dir
	}
	return f
}

// change makes n operations of one to three actions on st.
func (s *scribbler) change(st llb.State, n int) llb.State {
	for range n {
		action := s.action(nil)
		for range s.pick.IntN(3) {
			action = s.action(action)
		}
		st = st.File(action)
	}
	return st
}

func (s *scribbler) action(before *llb.FileAction) *llb.FileAction {
	var dirs, all []string
	for n, dir := range s.isDir {
		if dir {
			dirs = append(dirs, n)
		}
		if n != "" {
			all = append(all, n)
		}
	}
	slices.Sort(dirs)
	slices.Sort(all)
	at := llb.WithCreatedTime(made.Add(time.Duration(s.pick.IntN(3)) * time.Hour))
	name := path.Join(dirs[s.pick.IntN(len(dirs))], []string{"a", "b", "c", "d"}[s.pick.IntN(4)])
	dir, there := s.isDir[name]
	switch what := s.pick.IntN(10); {
	case what < 3 && len(all) > 0:
		gone := all[s.pick.IntN(len(all))]
		for _, n := range all {
			if n == gone || strings.HasPrefix(n, gone+"/") {
				delete(s.isDir, n)
			}
		}
		return before.Rm("/" + gone)
	case what < 6 && !there:
		s.isDir[name] = true
		return before.Mkdir("/"+name, 0o700|unix.S_IRWXG, at)
	case what < 7 && !there:
		s.isDir[name] = false
		return before.Symlink("/somewhere", "/"+name, at)
	case there && dir:
		return s.action(before)
	default:
		s.isDir[name] = false
		return before.Mkfile("/"+name, 0o640, []byte{byte('0' + s.pick.IntN(4))}, at)
	}
}
