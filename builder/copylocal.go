package builder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"varve.dev/errdefs"
	"varve.dev/layout"
)

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
