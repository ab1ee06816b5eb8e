package builder

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/bzip2"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/continuity/fs"
	copyfs "github.com/tonistiigi/fsutil/copy"

	"varve.dev/errdefs"
	"varve.dev/layer"
)

// unpack extracts name into the directory to if it is an archive, compressed
// or not, as ADD does, and tells whether it was one. What is in it becomes
// owner's, if owner has a say in whose files are.
func unpack(ctx context.Context, src, name, dst, to string, owner copyfs.Chowner, ns int64) (bool, error) {
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
	if is, err := isArchive(ctx, f); !is || err != nil {
		return false, err
	}
	dir, err := fs.RootPath(dst, filepath.Join("/", to))
	if err != nil {
		return false, err
	}
	if _, err := copyfs.MkdirAll(dir, 0o755, owner, times(ns)); err != nil {
		return false, err
	}
	stream, err := unpacked(ctx, f)
	if err != nil {
		return false, err
	}
	defer stream.Close()
	// An archive's own file called .wh.something is a file like others.
	asItIs := archive.WithConvertWhiteout(func(*tar.Header, string) (bool, error) { return true, nil })
	asOwner := archive.WithFilter(func(hdr *tar.Header) (bool, error) {
		u, err := owner(&copyfs.User{UID: hdr.Uid, GID: hdr.Gid})
		if err == nil {
			hdr.Uid, hdr.Gid = u.UID, u.GID
		}
		return true, err
	})
	_, err = archive.Apply(ctx, dir, stream, asItIs, asOwner)
	return true, err
}

// isArchive tells whether a file begins a tar stream, compressed or not.
func isArchive(ctx context.Context, f *os.File) (bool, error) {
	stream, err := unpacked(ctx, f)
	if err != nil {
		return false, err
	}
	defer stream.Close()
	_, err = tar.NewReader(stream).Next()
	return err == nil, nil
}

var (
	bzip2Magic = []byte("BZh")
	xzMagic    = []byte("\xfd7zXZ\x00")
)

// unpacked returns the stream in a file, however that is compressed: as layers
// are, or by bzip2 or xz, which only ADD knows.
func unpacked(ctx context.Context, f *os.File) (io.ReadCloser, error) {
	head := make([]byte, len(xzMagic))
	if _, err := f.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, bzip2Magic):
		return io.NopCloser(bzip2.NewReader(bufio.NewReader(f))), nil
	case bytes.Equal(head, xzMagic):
		return unxz(ctx, f)
	}
	stream, _, err := layer.Decompress(f)
	if err != nil {
		return io.NopCloser(bytes.NewReader(nil)), nil // it only begins like one
	}
	return stream, nil
}

// xzMemory bounds what a stream may ask for. What xz -9 makes needs half of it.
const xzMemory = "128MiB"

// unxz has xz unpack a stream. Close ends it.
func unxz(ctx context.Context, f *os.File) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancel(ctx)
	r, w := io.Pipe()
	var text bytes.Buffer
	cmd := exec.CommandContext(ctx, "xz", "--decompress", "--stdout", "--quiet", "--memlimit-decompress="+xzMemory)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = f, w, &text
	if err := cmd.Start(); err != nil {
		cancel()
		return nil, fmt.Errorf("xz, which unpacks archives that it made: %w: %w", err, errdefs.ErrUnavailable)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		err := cmd.Wait()
		if err != nil {
			err = fmt.Errorf("xz: %s: %w: %w", strings.TrimSpace(text.String()), err, errdefs.ErrInvalidArgument)
		}
		w.CloseWithError(err)
	}()
	return &command{r, func() {
		cancel()
		_ = r.Close()
		<-done
	}}, nil
}

// command is what a program prints.
type command struct {
	io.Reader
	end func()
}

func (c *command) Close() error {
	c.end()
	return nil
}
