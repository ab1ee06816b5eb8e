package builder

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	intoto "github.com/in-toto/in-toto-golang/in_toto"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/session/filesync"
	solverresult "github.com/moby/buildkit/solver/result"
	"github.com/moby/buildkit/util/staticfs"
	"github.com/opencontainers/go-digest"
	"github.com/tonistiigi/fsutil"
	fstypes "github.com/tonistiigi/fsutil/types"

	"varve.dev/errdefs"
	"varve.dev/layout"
	"varve.dev/overlay"
)

// filesExporter sends the files of a result to the client: into a directory
// there, or as a tar stream.
type filesExporter struct {
	j      *job
	id     int
	kind   string
	epoch  *epoch
	prefix string // of attestations' names
	split  *bool  // a directory for each platform; nil: if there are several
	source string // path in the result; empty: all
	delete bool   // what is there and not in the result goes
}

func newFilesExporter(j *job, id int, kind string, m map[string]string) (*filesExporter, error) {
	a := newAttrs(kind, m)
	x := &filesExporter{j: j, id: id, kind: kind, epoch: a.epoch(), prefix: a.text("attestation-prefix"), split: a.flag("platform-split")}
	if v, ok := a.take("src"); ok {
		if v == "" {
			return nil, fmt.Errorf("empty value for src; omit it to export the entire filesystem: %w", errdefs.ErrInvalidArgument)
		}
		x.source = v
	}
	mode, err := client.ParseLocalExporterMode(a.text("mode"))
	if err != nil {
		return nil, fmt.Errorf("exporter %s: %w: %w", kind, err, errdefs.ErrInvalidArgument)
	}
	x.delete = mode == client.LocalExporterModeDelete
	return x, a.err
}

func (x *filesExporter) title() string {
	if x.kind == client.ExporterTar {
		return "exporting to client tarball"
	}
	return "exporting to client directory"
}

func (x *filesExporter) export(ctx context.Context, v *vertex, b *built) (_ map[string]string, err error) {
	caller, err := x.j.caller(ctx, "")
	if err != nil {
		return nil, err
	}
	var mounts []*os.Root
	defer func() {
		for _, m := range mounts {
			err = errors.Join(err, m.Close())
		}
	}()
	split := b.perKey
	if x.split != nil {
		split = *x.split
	}
	if x.kind == client.ExporterTar {
		split = b.perKey
	}
	now := time.Now().Truncate(time.Second)
	var all fsutil.FS
	var dirs []fsutil.Dir
	seen := map[string]string{}
	for i := range b.platforms {
		p := &b.platforms[i]
		tree, err := b.tree(*p)
		if err != nil {
			return nil, err
		}
		at, err := b.epoch(x.epoch, p)
		if err != nil {
			return nil, err
		}
		mount, files, err := x.open(ctx, tree, at)
		if err != nil {
			return nil, err
		}
		mounts = append(mounts, mount)
		if files, err = x.withAttestations(ctx, b, p, files, at, now, b.perKey && !split); err != nil {
			return nil, err
		}
		switch {
		case split:
			st := &fstypes.Stat{Mode: uint32(os.ModeDir | 0o755), Path: platformDir(p.ID)}
			if at != nil {
				st.ModTime = at.UnixNano()
			}
			dirs = append(dirs, fsutil.Dir{FS: files, Stat: st})
		case all == nil:
			all = files
		default:
			all = staticfs.NewMergeFS(all, files)
		}
		if !split && b.perKey {
			if err := notTwice(ctx, files, p.ID, seen); err != nil {
				return nil, err
			}
		}
	}
	if split {
		if all, err = fsutil.SubDirFS(dirs); err != nil {
			return nil, err
		}
	}
	if x.kind == client.ExporterTar {
		defer x.j.progress.part(v, "sending tarball", "sending").done()
		out, err := filesync.CopyFileWriter(ctx, nil, x.id, caller)
		if err != nil {
			return nil, err
		}
		err = fsutil.WriteTar(ctx, all, out)
		return nil, errors.Join(err, out.Close())
	}
	told := x.j.progress.part(v, "copying files", "transferring")
	defer told.done()
	var options []filesync.CopyToCallerOpt
	if x.delete {
		options = append(options, filesync.WithExporterMultiPlatformTransfer())
	}
	return nil, filesync.CopyToCaller(ctx, all, x.id, caller, func(n int, _ bool) { told.at(int64(n), 0) }, options...)
}

// platformDir is a platform's name as a directory.
func platformDir(id string) string { return strings.ReplaceAll(id, "/", "_") }

// notTwice refuses a file that another platform has too.
func notTwice(ctx context.Context, files fsutil.FS, id string, seen map[string]string) error {
	return files.Walk(ctx, "", func(p string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		if other, ok := seen[p]; ok {
			return fmt.Errorf("cannot overwrite %s from %s with %s when split option is disabled: %w", p, other, id, errdefs.ErrAlreadyExists)
		}
		seen[p] = id
		return nil
	})
}

// open mounts a tree, until the root that it returns is closed.
func (x *filesExporter) open(ctx context.Context, key layout.SnapshotKey, at *time.Time) (*os.Root, fsutil.FS, error) {
	var tree overlay.Tree
	if key != "" {
		var err error
		if tree, err = x.j.b.Snaps.Tree(ctx, key); err != nil {
			return nil, nil, err
		}
	}
	root, err := openMount(x.j.b.Scratch, tree, x.source)
	if err != nil {
		if x.source != "" {
			err = fmt.Errorf("src=%s: %w", x.source, err)
		}
		return nil, nil, err
	}
	files := fsutil.NewRootFS(fsutil.NewRoot(root))
	if at != nil {
		files, err = fsutil.NewFilterFS(files, &fsutil.FilterOpt{Map: func(_ string, st *fstypes.Stat) fsutil.MapResult {
			st.ModTime = at.UnixNano()
			return fsutil.MapResultKeep
		}})
	}
	if err != nil {
		err = errors.Join(err, root.Close())
	}
	return root, files, err
}

// withAttestations adds a file for each attestation of a platform. Its subjects
// are the files of the result.
func (x *filesExporter) withAttestations(ctx context.Context, b *built, p *exptypes.Platform, files fsutil.FS, at *time.Time, now time.Time, named bool) (fsutil.FS, error) {
	list := attestationsOf(b, *p, false)
	if len(list) == 0 {
		return files, nil
	}
	var subjects []intoto.Subject
	err := files.Walk(ctx, "", func(name string, e os.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		f, err := files.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		sum := digest.Canonical.Digester()
		if _, err := io.Copy(sum.Hash(), f); err != nil {
			return err
		}
		subjects = append(subjects, intoto.Subject{Name: name, Digest: solverresult.ToDigestMap(sum.Digest())})
		return nil
	})
	if err != nil {
		return nil, err
	}
	list, statements, err := x.j.statements(ctx, list, subjects)
	if err != nil {
		return nil, err
	}
	extra := staticfs.NewFS()
	names := map[string]bool{}
	for i, s := range statements {
		data, err := json.MarshalIndent(s, "", "  ")
		if err != nil {
			return nil, fmt.Errorf("attestation: %w: %w", err, errdefs.ErrInternal)
		}
		name := x.prefix + path.Base(list[i].Path)
		if named {
			ext := path.Ext(name)
			name = fmt.Sprintf("%s.%s%s", strings.TrimSuffix(name, ext), platformDir(p.ID), ext)
		}
		if names[name] {
			return nil, fmt.Errorf("duplicate attestation path name %s: %w", name, errdefs.ErrAlreadyExists)
		}
		names[name] = true
		st := &fstypes.Stat{Mode: 0o600, Path: name, ModTime: now.UnixNano()}
		if at != nil {
			st.ModTime = at.UnixNano()
		}
		extra.Add(name, st, data)
	}
	return staticfs.NewMergeFS(files, extra), nil
}
