package builder

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/filesync"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/patternmatcher"
	"github.com/tonistiigi/fsutil"
	fstypes "github.com/tonistiigi/fsutil/types"
	grpcmetadata "google.golang.org/grpc/metadata"

	"varve.dev/errdefs"
	"varve.dev/layer"
	"varve.dev/layout"
	"varve.dev/overlay"
)

// localOrigin is a directory of the client. What it had at the last build is
// kept, and only what has changed since is sent: the new state is a layer on
// the old one.
type localOrigin struct {
	j       *job
	v       *vertex
	name    string
	session string // that has the directory; "": the build's own
	hint    string
	only    bool // metadata alone is sent, but for what except matches
	except  []string
	differ  fsutil.DiffType
	filter  fsutil.FilterOpt

	snapshot layout.SnapshotKey // after identify
}

func newLocalOrigin(j *job, v *vertex, name string, attrs map[string]string) (*localOrigin, error) {
	o := &localOrigin{j: j, v: v, name: name}
	for key, value := range attrs {
		var err error
		switch key {
		case pb.AttrLocalSessionID:
			o.session = value
			if prefix, id, ok := strings.Cut(value, ":"); ok {
				o.name, o.session = prefix+"-"+name, id
			}
		case pb.AttrIncludePatterns:
			err = json.Unmarshal([]byte(value), &o.filter.IncludePatterns)
		case pb.AttrExcludePatterns:
			err = json.Unmarshal([]byte(value), &o.filter.ExcludePatterns)
		case pb.AttrFollowPaths:
			err = json.Unmarshal([]byte(value), &o.filter.FollowPaths)
		case pb.AttrSharedKeyHint:
			o.hint = value
		case pb.AttrLocalDiffer:
			if value == pb.AttrLocalDifferNone {
				o.differ = fsutil.DiffNone
			}
		case pb.AttrMetadataTransfer:
			o.only, err = strconv.ParseBool(value)
		case pb.AttrMetadataTransferExclude:
			err = json.Unmarshal([]byte(value), &o.except)
		}
		if err != nil {
			return nil, fmt.Errorf("local source %s: %s: %w: %w", name, key, err, errdefs.ErrInvalidArgument)
		}
	}
	return o, nil
}

// sendWhole has a directory sent again, whole, that is a result by itself.
func (j *job) sendWhole(r *reference) {
	v := r.graph.vertices[r.graph.root.vertex]
	if v.base || v.op.GetSource() == nil || !strings.HasPrefix(v.op.GetSource().Identifier, schemeLocal) {
		return
	}
	v.base = true
	j.mu.Lock()
	defer j.mu.Unlock()
	delete(j.memo, v.digest)
	delete(j.sources, v.digest)
}

// identify has the directory's files sent. Their digest is the key.
func (o *localOrigin) identify(ctx context.Context) (string, error) {
	caller, err := o.caller(ctx)
	if err != nil {
		return "", err
	}
	k := newKeyHash("local")
	k.add(o.name, o.hint, caller.SharedKey(), strconv.FormatBool(o.only))
	last := k.sum()
	// Two builds of one directory take turns, and the second finds what the
	// first has had sent.
	out, err := o.j.b.flights.do(ctx, last, func() (outputs, error) { return o.transfer(ctx, caller, last) })
	if err != nil {
		return "", err
	}
	o.snapshot = out.snapshots[0]
	return out.key, nil
}

func (o *localOrigin) bring(ctx context.Context, key string) (outputs, error) {
	return outputs{key: key, snapshots: []layout.SnapshotKey{o.snapshot}}, nil
}

// caller is the session that has the directory: the one that the source names,
// or the build's own if that is gone.
func (o *localOrigin) caller(ctx context.Context) (session.Caller, error) {
	if o.session != "" {
		if c, err := o.j.caller(ctx, o.session); err == nil {
			return c, nil
		}
	}
	return o.j.caller(ctx, "")
}

// maxContextLayers is how many changes of a directory are kept as layers on one
// another, before it is sent as a whole again.
const maxContextLayers = 24

// transfer brings what was there last up to date.
func (o *localOrigin) transfer(ctx context.Context, caller session.Caller, last string) (out outputs, err error) {
	j := o.j
	var base layout.SnapshotKey
	known, ok, err := j.lookup(ctx, last)
	if err != nil {
		return out, err
	}
	// What an image is to begin with is sent whole: older states of the
	// directory must not be in its layers.
	if ok && !o.v.base {
		ids, err := j.b.Snaps.LayerIDs(ctx, known.snapshots[0])
		if err != nil {
			return out, err
		}
		if len(ids) < maxContextLayers {
			base = known.snapshots[0]
		}
	}
	t := &step{j: j, v: o.v, key: last, began: time.Now()}
	was, err := j.view(ctx, base)
	if err != nil {
		return out, err
	}
	w := &contextLayer{step: t, base: base}
	changed, err := o.receive(ctx, caller, w, was)
	switch {
	case err != nil:
		w.discard()
		return out, err
	case !changed && base != "":
		w.discard()
		out = known
	default:
		if err := w.make(ctx); err != nil {
			return out, err
		}
		if out, err = t.commit(ctx, []layout.SnapshotKey{w.active}); err != nil {
			return out, err
		}
	}
	sum, err := j.digestOf(ctx, out.snapshots[0], everything)
	k := newKeyHash("files")
	k.add(sum)
	out.key = k.sum()
	return out, err
}

// contextLayer is the layer that takes what has changed in a directory. Most
// often that is nothing, and there never is one.
type contextLayer struct {
	*step
	base   layout.SnapshotKey
	active layout.SnapshotKey
	tree   overlay.Tree
}

func (w *contextLayer) make(ctx context.Context) (err error) {
	if w.active == "" {
		w.active, w.tree, err = w.prepare(ctx, w.base)
	}
	return err
}

func (w *contextLayer) discard() {
	if w.active != "" {
		w.step.discard(w.active)
	}
}

// open makes the layer and mounts the directory with it.
func (w *contextLayer) open(ctx context.Context) (fsutil.Root, error) {
	if err := w.make(ctx); err != nil {
		return nil, err
	}
	root, err := openMount(w.j.b.Scratch, w.tree, "")
	if err != nil {
		return nil, err
	}
	return fsutil.NewRoot(root), nil
}

// differs tells whether the layer has anything that was not there before, but for
// its time. What is sent whatever its time says is mostly what it was: keeping it
// would make a layer of every build.
func (w *contextLayer) differs(ctx context.Context, was *treeView) (bool, error) {
	m, err := layer.Walk(ctx, w.tree.Upper, layer.WalkOptions{})
	if err != nil {
		return false, fmt.Errorf("local source: %w: %w", err, errdefs.ErrUnavailable)
	}
	return slices.ContainsFunc(m.Entries, func(now layer.Entry) bool {
		if now.Names[0] == "." {
			return false
		}
		before := was.entries[now.Names[0]]
		if before == nil {
			return true
		}
		now.MTime = before.MTime
		return !reflect.DeepEqual(now, *before)
	}), nil
}

// receive has the client send what differs from what there was, into a layer,
// and tells whether anything did.
func (o *localOrigin) receive(ctx context.Context, caller session.Caller, w *contextLayer, was *treeView) (changed bool, err error) {
	root := &keptRoot{
		was:   newKeptFS(was),
		open:  func() (fsutil.Root, error) { return w.open(ctx) },
		upper: func() string { return w.tree.Upper },
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	if !caller.Supports(session.MethodURL(filesync.FileSync_ServiceDesc.ServiceName, "diffcopy")) {
		return false, fmt.Errorf("no local sources enabled: directory %q was not given: %w", o.name, errdefs.ErrNotFound)
	}
	ctx, cancel := context.WithCancel(caller.Context(ctx))
	defer cancel()
	stream, err := filesync.NewFileSyncClient(caller.Conn()).DiffCopy(grpcmetadata.NewOutgoingContext(ctx, o.header()))
	if err != nil {
		return false, err
	}
	told := o.j.progress.part(o.v, "transferring "+o.name+":", "transferring")
	defer told.done()
	options := fsutil.ReceiveOpt{
		Differ:     o.differ,
		ProgressCb: func(size int, _ bool) { told.at(int64(size), 0) },
	}
	if options.MetadataOnly, err = o.metadataOnly(); err != nil {
		return false, err
	}
	if err := fsutil.ReceiveRoot(ctx, stream, root, options); err != nil {
		return false, err
	}
	_ = stream.CloseSend()
	if w.active == "" {
		return false, nil
	}
	if o.differ == fsutil.DiffNone {
		return w.differs(ctx, was)
	}
	entries, err := os.ReadDir(w.tree.Upper)
	return len(entries) > 0, err
}

func (o *localOrigin) metadataOnly() (fsutil.FilterFunc, error) {
	if !o.only {
		return nil, nil
	}
	m, err := patternmatcher.New(o.except)
	if err != nil {
		return nil, fmt.Errorf("local source %s: %w: %w", o.name, err, errdefs.ErrInvalidArgument)
	}
	return func(p string, _ *fstypes.Stat) bool {
		ok, err := m.MatchesOrParentMatches(p)
		return err == nil && ok
	}, nil
}

// header is the request for the directory, as package filesync of BuildKit
// reads it. A value that is not ASCII has all of its key's values encoded.
func (o *localOrigin) header() grpcmetadata.MD {
	md := grpcmetadata.MD{}
	for key, values := range map[string][]string{
		"dir-name": {o.name}, "include-patterns": o.filter.IncludePatterns,
		"exclude-patterns": o.filter.ExcludePatterns, "followpaths": o.filter.FollowPaths,
	} {
		plain := true
		for _, v := range values {
			plain = plain && isASCII(v)
		}
		for _, v := range values {
			if !plain {
				v = url.QueryEscape(v)
			}
			md.Append(key, v)
		}
		if !plain {
			md.Set(key+"-encoded", "1")
		}
	}
	return md
}

func isASCII(s string) bool {
	for i := range len(s) {
		if s[i] >= 0x80 {
			return false
		}
	}
	return true
}
