package builder

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"github.com/moby/buildkit/frontend/dockerui"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"github.com/tonistiigi/fsutil"
	fstypes "github.com/tonistiigi/fsutil/types"

	"varve.dev/errdefs"
)

// localTree is what a build reads of a directory.
type localTree struct {
	once  sync.Once
	err   error
	dir   string
	key   string
	files []localFile
}

type localFile struct {
	name string
	stat *fstypes.Stat
}

// local lists and hashes the files of a local source, once in a build.
func (s *session) local(ctx context.Context, v *vertex, src *pb.SourceOp) (*localTree, error) {
	s.mu.Lock()
	t := s.locals[v.digest]
	if t == nil {
		t = &localTree{}
		s.locals[v.digest] = t
	}
	s.mu.Unlock()
	t.once.Do(func() { t.err = t.read(ctx, s.req.Context, src) })
	return t, t.err
}

// read walks the directory with the patterns that the frontend has made of the
// ignore file and of what the Dockerfile copies.
func (t *localTree) read(ctx context.Context, dir string, src *pb.SourceOp) error {
	name, _ := cutScheme(src.Identifier, schemeLocal)
	if name != dockerui.DefaultLocalNameContext && name != dockerui.DefaultLocalNameDockerfile {
		return fmt.Errorf("context %q was not given: %w", name, errdefs.ErrNotFound)
	}
	t.dir = dir
	var filter fsutil.FilterOpt
	for attr, into := range map[string]*[]string{
		pb.AttrIncludePatterns: &filter.IncludePatterns, pb.AttrExcludePatterns: &filter.ExcludePatterns, pb.AttrFollowPaths: &filter.FollowPaths,
	} {
		if text := src.Attrs[attr]; text != "" {
			if err := json.Unmarshal([]byte(text), into); err != nil {
				return fmt.Errorf("patterns of the build context: %w: %w", err, errdefs.ErrInvalidArgument)
			}
		}
	}
	tree, err := fsutil.NewFS(dir)
	if err == nil {
		tree, err = fsutil.NewFilterFS(tree, &filter)
	}
	if err != nil {
		return fmt.Errorf("build context %s: %w: %w", dir, err, errdefs.ErrInvalidArgument)
	}
	k := newKeyHash("local")
	err = tree.Walk(ctx, "", func(name string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return t.add(k, name, d)
	})
	if err != nil {
		return fmt.Errorf("build context %s: %w: %w", dir, err, errdefs.ErrInvalidArgument)
	}
	t.key = k.sum()
	return nil
}

// add hashes one file: its name, type, mode, link target and contents. Owners
// and times are those of a checkout and say nothing.
func (t *localTree) add(k keyHash, name string, d os.DirEntry) error {
	fi, err := d.Info()
	if err != nil {
		return err
	}
	stat, ok := fi.Sys().(*fstypes.Stat)
	if !ok {
		return fmt.Errorf("%s: no description", name)
	}
	mode := os.FileMode(stat.Mode)
	if mode&os.ModeSocket != 0 {
		return nil
	}
	sum := ""
	if mode.IsRegular() {
		f, err := os.Open(filepath.Join(t.dir, name))
		if err != nil {
			return err
		}
		defer f.Close()
		if sum, err = sumOf(f); err != nil {
			return err
		}
	}
	k.add(filepath.ToSlash(name), mode.String(), stat.Linkname, sum)
	t.files = append(t.files, localFile{name, stat})
	return nil
}

func sumOf(r io.Reader) (string, error) {
	d, err := digest.Canonical.FromReader(r)
	return d.Encoded(), err
}

// openLocal opens a file of the build context for the frontend. A Dockerfile
// from outside stands in for one in the context.
func (s *session) openLocal(src *pb.SourceOp, name string) (*os.File, error) {
	local, _ := cutScheme(src.Identifier, schemeLocal)
	if s.req.DockerfileBytes != nil && local == dockerui.DefaultLocalNameDockerfile && relative(name) == s.dockerfileName() {
		return memoryFile(s.req.DockerfileBytes)
	}
	root, err := os.OpenRoot(s.req.Context)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	return root.Open(relative(name))
}

// memoryFile is a file without a name.
func memoryFile(data []byte) (*os.File, error) {
	f, err := os.CreateTemp("", "varve-dockerfile-")
	if err != nil {
		return nil, err
	}
	err = os.Remove(f.Name())
	if err == nil {
		_, err = io.Copy(f, bytes.NewReader(data))
	}
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
