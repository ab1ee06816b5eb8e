package buildkit

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	intoto "github.com/in-toto/in-toto-golang/in_toto"
	control "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"varve.dev/builder"
	"varve.dev/errdefs"
)

// Media types of what is kept of a build, as BuildKit's clients know them.
const (
	mediaStatus = "application/vnd.buildkit.status.v0"
	mediaError  = "application/vnd.googleapis.google.rpc.status+proto"
	mediaTrace  = "application/vnd.buildkit.otlp.json.v0"
)

// ListenBuildHistory tells of the builds that run and of the last ones that did,
// and then, unless it is to exit early, of what changes.
func (s *Server) ListenBuildHistory(req *control.BuildHistoryRequest, stream control.Control_ListenBuildHistoryServer) error {
	if err := sendTime(stream); err != nil {
		return err
	}
	return s.builds.listen(stream.Context(), req, stream.Send)
}

// UpdateBuildHistory pins a build's record, or drops it.
func (s *Server) UpdateBuildHistory(_ context.Context, req *control.UpdateBuildHistoryRequest) (*control.UpdateBuildHistoryResponse, error) {
	return &control.UpdateBuildHistoryResponse{}, s.builds.update(req)
}

// finish completes the record of a build that is over. Callers hold mu.
func (b *build) finish(response builder.Response, err error) {
	r := b.record
	r.ExporterResponse = response.Exported
	r.NumWarnings = int32(b.warnings)
	for _, v := range b.vertices {
		r.NumTotalSteps++
		if v.Cached {
			r.NumCachedSteps++
		}
		if v.Completed != nil {
			r.NumCompletedSteps++
		}
	}
	r.Logs = b.keep(mediaStatus, b.encodeEvents())
	r.Trace = b.keep(mediaTrace, b.encodeTrace())
	if err != nil {
		whole := status.Convert(grpcerrors.ToGRPC(context.Background(), err)).Proto()
		if data, merr := proto.Marshal(whole); merr == nil {
			r.ExternalError = b.keep(mediaError, data)
		}
		r.Error = &rpcstatus.Status{Code: whole.Code, Message: whole.Message}
	}
	for id, p := range response.Provenance {
		desc := b.keep(intoto.PayloadType, p.Predicate)
		desc.Annotations = map[string]string{"in-toto.io/predicate-type": p.PredicateType}
		info := &control.BuildResultInfo{Attestations: []*control.Descriptor{desc}}
		if id == "" {
			r.Result = info
			continue
		}
		if r.Results == nil {
			r.Results = map[string]*control.BuildResultInfo{}
		}
		r.Results[id] = info
	}
	if desc := imageOf(response.Exported); desc != nil {
		if r.Result == nil {
			r.Result = &control.BuildResultInfo{}
		}
		r.Result.ResultDeprecated, r.Result.Results = desc, map[int64]*control.Descriptor{0: desc}
	}
}

// imageOf is the image that an exporter tells of; nil if it does not.
func imageOf(response map[string]string) *control.Descriptor {
	data, err := base64.StdEncoding.DecodeString(response[exptypes.ExporterImageDescriptorKey])
	var desc ocispec.Descriptor
	if err != nil || json.Unmarshal(data, &desc) != nil || desc.Digest == "" {
		return nil
	}
	return &control.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest.String(), Size: desc.Size, Annotations: desc.Annotations}
}

// keep keeps a blob for as long as the build is known.
func (b *build) keep(mediaType string, data []byte) *control.Descriptor {
	d := digest.FromBytes(data)
	if b.blobs == nil {
		b.blobs = map[digest.Digest][]byte{}
	}
	b.blobs[d] = data
	b.kept += len(data)
	return &control.Descriptor{MediaType: mediaType, Digest: d.String(), Size: int64(len(data))}
}

// encodeEvents is what was told of the build: messages, each with its length
// before it.
func (b *build) encodeEvents() []byte {
	var out bytes.Buffer
	for _, e := range b.events {
		for _, m := range e.Marshal() {
			data, err := m.MarshalVT()
			if err != nil {
				continue
			}
			_ = binary.Write(&out, binary.LittleEndian, uint32(len(data)))
			out.Write(data)
		}
	}
	return out.Bytes()
}

// span is a span of a trace in OpenTelemetry's terms, as BuildKit stores it.
type span struct {
	Name        string
	SpanContext spanContext
	Parent      spanContext
	StartTime   time.Time
	EndTime     time.Time
	Attributes  []spanAttribute
}

type spanContext struct{ TraceID, SpanID string }

type spanAttribute struct {
	Key   string
	Value struct{ Type, Value string }
}

// encodeTrace makes a trace of the build's vertices, one span after the other.
func (b *build) encodeTrace() []byte {
	id := func(s string, n int) string { return hex.EncodeToString([]byte(digest.FromString(s).Encoded())[:n]) }
	trace := id(b.record.Ref, 16)
	root := spanContext{trace, id("build "+b.record.Ref, 8)}
	all := []span{{Name: "build", SpanContext: root, StartTime: b.record.CreatedAt.AsTime(), EndTime: b.record.CompletedAt.AsTime()}}
	for d, v := range b.vertices {
		if v.Started == nil || v.Completed == nil {
			continue
		}
		s := span{Name: v.Name, SpanContext: spanContext{trace, id(d, 8)}, Parent: root, StartTime: *v.Started, EndTime: *v.Completed}
		a := spanAttribute{Key: "vertex"}
		a.Value.Type, a.Value.Value = "STRING", d
		s.Attributes = append(s.Attributes, a)
		all = append(all, s)
	}
	slices.SortFunc(all[1:], func(a, b span) int { return a.StartTime.Compare(b.StartTime) })
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetIndent("", "  ")
	for _, s := range all {
		_ = enc.Encode(s) // of strings and times
	}
	return out.Bytes()
}

// event is what there is to tell of a build.
func (b *build) event() *control.BuildHistoryEvent {
	e := &control.BuildHistoryEvent{Type: control.BuildHistoryEventType_STARTED, Record: b.record.CloneVT()}
	if b.over {
		e.Type = control.BuildHistoryEventType_COMPLETE
	}
	return e
}

// listen calls send with what there is of builds, and with what changes.
func (bs *builds) listen(ctx context.Context, req *control.BuildHistoryRequest, send func(*control.BuildHistoryEvent) error) error {
	keep, err := historyFilter(req.Filter)
	if err != nil {
		return err
	}
	bs.mu.Lock()
	defer bs.mu.Unlock()
	bs.listeners++
	defer bs.leave()
	next := bs.firstTold + len(bs.told)
	var now []*control.BuildHistoryEvent
	for _, b := range bs.all {
		if (req.Ref == "" || b.record.Ref == req.Ref) && (!b.over || !req.ActiveOnly) && keep(b.record) {
			now = append(now, b.event())
		}
	}
	slices.SortFunc(now, func(a, b *control.BuildHistoryEvent) int {
		return b.Record.CreatedAt.AsTime().Compare(a.Record.CreatedAt.AsTime())
	})
	if req.Limit > 0 && len(now) > int(req.Limit) {
		now = now[:req.Limit]
	}
	for {
		bs.mu.Unlock()
		for _, e := range now {
			if err == nil && (req.Ref == "" || e.Record.Ref == req.Ref) && keep(e.Record) {
				err = send(e)
			}
		}
		bs.mu.Lock()
		if err != nil || req.EarlyExit {
			return err
		}
		if err := bs.wait(ctx, func() bool { return next < bs.firstTold+len(bs.told) }); err != nil {
			return err
		}
		now = slices.Clone(bs.told[max(0, next-bs.firstTold):])
		next = bs.firstTold + len(bs.told)
	}
}

// leave ends the listening of one listener. Callers hold mu.
func (bs *builds) leave() {
	if bs.listeners--; bs.listeners == 0 {
		bs.firstTold += len(bs.told)
		bs.told = nil
	}
}

// keptEvents is how many events a listener may be behind.
const keptEvents = 1024

// announce tells listeners of a build; what nobody listens to is not kept. Callers
// hold mu.
func (bs *builds) announce(e *control.BuildHistoryEvent) {
	defer bs.changed.Broadcast()
	if bs.listeners == 0 {
		bs.firstTold++
		return
	}
	bs.told = append(bs.told, e)
	if drop := len(bs.told) - keptEvents; drop > 0 {
		bs.told = slices.Delete(bs.told, 0, drop)
		bs.firstTold += drop
	}
}

// update changes what is known of a build.
func (bs *builds) update(req *control.UpdateBuildHistoryRequest) error {
	bs.mu.Lock()
	defer bs.mu.Unlock()
	b := bs.all[req.Ref]
	switch {
	case b == nil:
		return fmt.Errorf("failed to retrieve ref %s: %w", req.Ref, errdefs.ErrNotFound)
	case req.Finalize:
		return nil // it is complete as soon as the build is over
	case !b.over:
		return fmt.Errorf("build %s is running: %w", req.Ref, errdefs.ErrFailedPrecondition)
	case req.Delete:
		bs.forget(b)
		bs.announce(&control.BuildHistoryEvent{Type: control.BuildHistoryEventType_DELETED, Record: b.record.CloneVT()})
	default:
		b.record.Pinned = req.Pinned
		bs.announce(b.event())
	}
	return nil
}

// historyFilter reads filters: of each all comma-separated terms have to hold,
// and one of the filters has to.
func historyFilter(list []string) (func(*control.BuildHistoryRecord) bool, error) {
	for _, f := range list {
		for term := range strings.SplitSeq(f, ",") {
			key, _, ok := strings.Cut(strings.Replace(term, "!=", "==", 1), "==")
			if !ok || key != "ref" && key != "status" && key != "repository" {
				return nil, fmt.Errorf("filter %q: %w", term, errdefs.ErrInvalidArgument)
			}
		}
	}
	holds := func(r *control.BuildHistoryRecord, term string) bool {
		key, want, equal := strings.Cut(term, "==")
		if !equal {
			key, want, _ = strings.Cut(term, "!=")
		}
		have := r.Ref
		switch key {
		case "status":
			have = "completed"
			if r.CompletedAt == nil {
				have = "running"
			} else if r.Error != nil {
				have = "error"
			}
		case "repository":
			have = r.FrontendAttrs["vcs:source"]
		}
		return (have == want) == equal
	}
	return func(r *control.BuildHistoryRecord) bool {
		for _, f := range list {
			all := true
			for term := range strings.SplitSeq(f, ",") {
				all = all && holds(r, term)
			}
			if all {
				return true
			}
		}
		return len(list) == 0
	}, nil
}

// blobStore is what clients may read: what is kept of builds, and the blobs of
// the store.
type blobStore struct {
	content.Store // refuses what writes
	builds        *builds
	backend       Backend
}

// Info describes a blob.
func (s *blobStore) Info(ctx context.Context, d digest.Digest) (content.Info, error) {
	if data, ok := s.builds.blob(d); ok {
		return content.Info{Digest: d, Size: int64(len(data))}, nil
	}
	return s.backend.BlobInfo(ctx, d)
}

// ReaderAt reads a blob.
func (s *blobStore) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if data, ok := s.builds.blob(desc.Digest); ok {
		return &memoryBlob{bytes.NewReader(data)}, nil
	}
	return s.backend.BlobReader(ctx, desc)
}

// memoryBlob reads a blob in memory.
type memoryBlob struct{ *bytes.Reader }

func (*memoryBlob) Close() error { return nil }

// blob is a blob that is kept of a build.
func (bs *builds) blob(d digest.Digest) ([]byte, bool) {
	bs.mu.Lock()
	defer bs.mu.Unlock()
	for _, b := range bs.all {
		if data, ok := b.blobs[d]; ok {
			return data, true
		}
	}
	return nil, false
}

// readOnly refuses what clients may not do with blobs.
type readOnly struct{}

var errReadOnly = fmt.Errorf("the content store is read-only here: %w", errdefs.ErrPermissionDenied)

func (readOnly) Info(context.Context, digest.Digest) (content.Info, error) {
	return content.Info{}, errReadOnly
}
func (readOnly) Update(context.Context, content.Info, ...string) (content.Info, error) {
	return content.Info{}, errReadOnly
}
func (readOnly) Walk(context.Context, content.WalkFunc, ...string) error { return errReadOnly }
func (readOnly) Delete(context.Context, digest.Digest) error             { return errReadOnly }
func (readOnly) Status(context.Context, string) (content.Status, error) {
	return content.Status{}, errReadOnly
}
func (readOnly) ListStatuses(context.Context, ...string) ([]content.Status, error) {
	return nil, errReadOnly
}
func (readOnly) Abort(context.Context, string) error { return errReadOnly }
func (readOnly) Writer(context.Context, ...content.WriterOpt) (content.Writer, error) {
	return nil, errReadOnly
}
func (readOnly) ReaderAt(context.Context, ocispec.Descriptor) (content.ReaderAt, error) {
	return nil, errReadOnly
}
