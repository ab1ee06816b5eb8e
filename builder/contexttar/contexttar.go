// Package contexttar carries a build context over a socket: a directory's
// files, without what .dockerignore excludes, as a tar stream and back.
//
// Owns nothing on disk. Concurrency: every call stands for itself.
package contexttar

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"

	"varve.dev/errdefs"
)

// DefaultDockerfile is the Dockerfile's name if nobody says another.
const DefaultDockerfile = "Dockerfile"

// Open returns the context in dir as a tar stream. dockerfile is its path in
// dir; it and the ignore file are part of the stream whatever the latter says,
// for the build needs them. Closing the stream ends the reading of files.
func Open(ctx context.Context, dir, dockerfile string) (io.ReadCloser, error) {
	if dockerfile == "" {
		dockerfile = DefaultDockerfile
	}
	ignored, keep, err := ignores(dir, dockerfile)
	if err != nil {
		return nil, err
	}
	r, w := io.Pipe()
	go func() {
		p := &packer{ctx: ctx, dir: dir, tar: tar.NewWriter(w), ignored: ignored, keep: keep}
		err := filepath.WalkDir(dir, p.visit)
		if err == nil {
			err = p.tar.Close()
		}
		w.CloseWithError(err)
	}()
	return r, nil
}

// ignores reads <dockerfile>.dockerignore, or .dockerignore if there is none.
func ignores(dir, dockerfile string) (*patternmatcher.PatternMatcher, map[string]bool, error) {
	keep := map[string]bool{filepath.Clean(dockerfile): true}
	for _, name := range []string{dockerfile + ".dockerignore", ".dockerignore"} {
		f, err := os.Open(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, nil, fmt.Errorf("build context: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		defer f.Close()
		patterns, err := ignorefile.ReadAll(f)
		if err == nil {
			keep[filepath.Clean(name)] = true
			var m *patternmatcher.PatternMatcher
			if m, err = patternmatcher.New(patterns); err == nil {
				return m, keep, nil
			}
		}
		return nil, nil, fmt.Errorf("build context: %s: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	return nil, keep, nil
}

type packer struct {
	ctx     context.Context
	dir     string
	tar     *tar.Writer
	ignored *patternmatcher.PatternMatcher
	keep    map[string]bool
}

func (p *packer) visit(full string, d fs.DirEntry, err error) error {
	if err != nil {
		return err
	}
	if err := p.ctx.Err(); err != nil {
		return err
	}
	rel, err := filepath.Rel(p.dir, full)
	if err != nil || rel == "." {
		return err
	}
	skip, err := p.skips(rel)
	if err != nil {
		return err
	}
	if skip {
		// A pattern that is negated may still bring back what is below.
		if d.IsDir() && !p.ignored.Exclusions() && !p.keeps(rel) {
			return filepath.SkipDir
		}
		if !d.IsDir() {
			return nil
		}
	}
	return p.add(rel, full, d)
}

func (p *packer) skips(rel string) (bool, error) {
	if p.ignored == nil || p.keep[rel] {
		return false, nil
	}
	return p.ignored.MatchesOrParentMatches(rel)
}

// keeps tells whether something that has to be in the stream is below dir.
func (p *packer) keeps(dir string) bool {
	for name := range p.keep {
		if strings.HasPrefix(name, dir+"/") {
			return true
		}
	}
	return false
}

func (p *packer) add(rel, full string, d fs.DirEntry) error {
	fi, err := d.Info()
	if err != nil {
		return err
	}
	if fi.Mode()&fs.ModeSocket != 0 {
		return nil
	}
	target := ""
	if fi.Mode()&fs.ModeSymlink != 0 {
		if target, err = os.Readlink(full); err != nil {
			return err
		}
	}
	hdr, err := tar.FileInfoHeader(fi, target)
	if err != nil {
		return err
	}
	hdr.Name = rel
	hdr.Format = tar.FormatPAX
	// The context's files are root's in the image, whoever has them here.
	hdr.Uid, hdr.Gid, hdr.Uname, hdr.Gname = 0, 0, "", ""
	if err := p.tar.WriteHeader(hdr); err != nil {
		return err
	}
	if !fi.Mode().IsRegular() {
		return nil
	}
	f, err := os.Open(full)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(p.tar, f)
	return err
}

// Extract unpacks a stream of [Open] into dir, which is the caller's, and reads
// it to its end: only behind that a server notices that its client is gone. A
// name that leads out of dir is an error of kind ErrInvalidArgument.
func Extract(ctx context.Context, r io.Reader, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("build context: %w: %w", err, errdefs.ErrUnavailable)
	}
	defer root.Close()
	tr := tar.NewReader(r)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			if _, err = io.Copy(io.Discard, r); err == nil {
				return nil
			}
		} else if err == nil {
			err = extractEntry(root, hdr, tr)
		}
		if err != nil {
			return fmt.Errorf("build context: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
}

func extractEntry(root *os.Root, hdr *tar.Header, r io.Reader) error {
	name := path.Clean(hdr.Name)
	if dir := path.Dir(name); dir != "." {
		if err := root.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	mode := hdr.FileInfo().Mode()
	switch hdr.Typeflag {
	case tar.TypeDir:
		if err := root.MkdirAll(name, 0o755); err != nil {
			return err
		}
	case tar.TypeReg:
		f, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, r)
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
	case tar.TypeSymlink:
		return root.Symlink(hdr.Linkname, name)
	default:
		return fmt.Errorf("%q has a type that no build context has", hdr.Name)
	}
	if err := root.Chmod(name, mode); err != nil {
		return err
	}
	return root.Chtimes(name, hdr.ModTime, hdr.ModTime)
}
