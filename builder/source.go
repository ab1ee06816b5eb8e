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
	"strings"
	"sync"

	"github.com/moby/buildkit/frontend/dockerui"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tonistiigi/fsutil"
	fstypes "github.com/tonistiigi/fsutil/types"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

// Schemes of source identifiers.
const (
	schemeImage = "docker-image://"
	schemeLocal = "local://"
)

func cutScheme(identifier, scheme string) (string, bool) {
	return strings.CutPrefix(identifier, scheme)
}

// resolved is a base image as this build knows it.
type resolved struct {
	digest digest.Digest
	config []byte
}

// resolve asks once for each image and platform.
func (s *session) resolve(ctx context.Context, ref string, platform ocispec.Platform) (digest.Digest, []byte, error) {
	id := ref + " " + platform.OS + "/" + platform.Architecture + "/" + platform.Variant
	s.mu.Lock()
	known, ok := s.resolved[id]
	s.mu.Unlock()
	if ok {
		return known.digest, known.config, nil
	}
	d, config, err := s.req.Images.Resolve(ctx, ref, platform, s.req.Pull)
	if err != nil {
		return "", nil, err
	}
	s.mu.Lock()
	s.resolved[id] = resolved{d, config}
	s.mu.Unlock()
	return d, config, nil
}

func (s *session) platformOf(v *vertex) ocispec.Platform {
	if p := v.op.Platform; p != nil {
		return ocispec.Platform{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant}
	}
	return s.platform
}

// sourceKey is the identity of a source: the digest of an image, the digest of
// the files that a build reads of its context.
func (s *session) sourceKey(ctx context.Context, v *vertex, src *pb.SourceOp) (string, error) {
	if ref, ok := cutScheme(src.Identifier, schemeImage); ok {
		d, _, err := s.resolve(ctx, ref, s.platformOf(v))
		k := newKeyHash("image")
		k.add(d.String())
		return k.sum(), err
	}
	if _, ok := cutScheme(src.Identifier, schemeLocal); ok {
		t, err := s.local(ctx, v, src)
		if err != nil {
			return "", err
		}
		return t.key, nil
	}
	return "", fmt.Errorf("source %q: only images and the build context can be sources here: %w", src.Identifier, errdefs.ErrNotImplemented)
}

// source brings a source into the store.
func (s *session) source(ctx context.Context, v *vertex, src *pb.SourceOp) (outputs, error) {
	key, err := s.sourceKey(ctx, v, src)
	if err != nil {
		return outputs{}, err
	}
	if ref, ok := cutScheme(src.Identifier, schemeImage); ok {
		d, _, err := s.resolve(ctx, ref, s.platformOf(v))
		if err != nil {
			return outputs{}, err
		}
		snap, err := s.req.Images.Snapshot(ctx, ref, d, s.platformOf(v))
		if err != nil {
			return outputs{}, err
		}
		out := outputs{key: key, snapshots: []layout.SnapshotKey{snap}}
		return out, s.hold(ctx, out.snapshots)
	}
	return s.b.flights.do(ctx, key, func() (outputs, error) {
		out, ok, err := s.peek(ctx, key)
		if err == nil && ok {
			if err = s.hold(ctx, out.snapshots); err == nil {
				return out, nil
			}
		}
		t, err := s.local(ctx, v, src)
		if err != nil {
			return outputs{}, err
		}
		step := &step{s: s, v: v, key: key}
		return step.copyLocal(ctx, t)
	})
}

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

// explain gives an error of the frontend a kind.
func (s *session) explain(err error) error {
	switch {
	case errdefs.Has(err):
		return fmt.Errorf("build: %w", err)
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("build: %w: %w", err, errdefs.ErrNotFound)
	}
	return fmt.Errorf("build: %w: %w", err, errdefs.ErrInvalidArgument)
}
