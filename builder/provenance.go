package builder

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/platforms"
	slsa02 "github.com/in-toto/in-toto-golang/in_toto/slsa_provenance/v0.2"
	slsa1 "github.com/in-toto/in-toto-golang/in_toto/slsa_provenance/v1"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/frontend/attestations"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/identity"
	bkerrdefs "github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/llbsolver/provenance/types"
	solverresult "github.com/moby/buildkit/solver/result"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
)

// The builder's own frontends.
const (
	frontendDockerfile = "dockerfile.v0"
	frontendGateway    = "gateway.v0"
)

// asWritten makes a request for the gateway with the Dockerfile frontend what
// it is: one for the builder's own, unless the client has another of that name.
// Clients ask so that the file's syntax line is not followed.
func asWritten(req Request) Request {
	if req.Frontend != frontendGateway || req.Attrs[keySource] != frontendDockerfile {
		return req
	}
	named := optContext + ":" + frontendDockerfile
	for k := range req.Attrs {
		if k == named || strings.HasPrefix(k, named+"::") {
			return req
		}
	}
	req.Frontend, req.Attrs = frontendDockerfile, maps.Clone(req.Attrs)
	delete(req.Attrs, keySource)
	return req
}

// invocation is one build among all that ever ran.
type invocation struct {
	id    string
	began time.Time
	once  sync.Once
	ended time.Time
	// traced is how much is remembered of it: see maxTraced.
	traced atomic.Int64
}

func newInvocation() *invocation { return &invocation{id: identity.NewID(), began: time.Now().UTC()} }

// end is when the first attestation was written: a build cannot state when it
// was over after that.
func (i *invocation) end() time.Time {
	i.once.Do(func() { i.ended = time.Now().UTC() })
	return i.ended
}

// wishes are the attestations that the client asks for; nil: none of the kind.
type wishes struct {
	sbom       *sbomWish
	provenance *provenanceWish
}

// provenanceWish says what provenance is to look like.
type provenanceWish struct {
	version      types.ProvenanceSLSA
	max          bool // with the definition and its layers, and all options
	reproducible bool // the client says so
	inline       bool // only in an image's index
	complete     bool // every source has to be known
	builder      string
	filename     string
}

// provenanceFile is what the local exporter calls provenance.
const provenanceFile = "provenance.json"

// wishesOf reads what attestations are asked for.
func wishesOf(opts map[string]string) (w wishes, err error) {
	all, err := attestations.Parse(opts)
	if err != nil {
		return w, fmt.Errorf("attestations: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if attrs, ok := all[attestations.KeyTypeSbom]; ok {
		if w.sbom, err = newSBOMWish(attrs, opts); err != nil {
			return w, err
		}
	}
	if attrs, ok := all[attestations.KeyTypeProvenance]; ok {
		w.provenance, err = newProvenanceWish(attrs)
	}
	return w, err
}

func newProvenanceWish(attrs map[string]string) (*provenanceWish, error) {
	w := &provenanceWish{max: true, filename: provenanceFile}
	for key, value := range attrs {
		var err error
		switch key {
		case "version":
			w.version = types.ProvenanceSLSA(value)
			err = w.version.Validate()
		case "mode":
			switch value {
			case "max", "full":
			case "min":
				w.max = false
			default:
				err = errors.New("the modes are min and max")
			}
		case "reproducible":
			w.reproducible, err = strconv.ParseBool(value)
		case "complete-materials":
			w.complete, err = strconv.ParseBool(value)
		case "inline-only":
			w.inline, _ = strconv.ParseBool(value) // what is no boolean has always meant no
		case "builder-id":
			w.builder = value
		case "filename":
			w.filename = value
		}
		if err != nil {
			return nil, fmt.Errorf("provenance: invalid %s %q: %w: %w", key, value, err, errdefs.ErrInvalidArgument)
		}
	}
	return w, nil
}

// attach adds the attestations that were asked for to a result that was solved.
// Provenance is of what the frontend did, not of the scanner that comes first.
func (j *job) attach(ctx context.Context, w wishes, res *gwclient.Result) error {
	if res == nil {
		return nil
	}
	var stated map[string]*statedProvenance
	var err error
	if w.provenance != nil {
		if stated, err = j.state(w.provenance, res); err != nil {
			return err
		}
	}
	if w.sbom != nil {
		if err := j.scan(ctx, w.sbom, res); err != nil {
			return err
		}
	}
	for _, id := range slices.Sorted(maps.Keys(stated)) {
		res.AddAttestation(id, stated[id].attestation(w.provenance))
	}
	return nil
}

// recorded is the provenance that is kept of a build, whatever its client asks for.
func (j *job) recorded(ctx context.Context, res *gwclient.Result) (map[string]Provenance, error) {
	w := &provenanceWish{max: true, version: types.ProvenanceSLSA1}
	if asked, err := wishesOf(j.req.Attrs); err == nil && asked.provenance != nil {
		w.builder = asked.provenance.builder
	}
	if res.IsEmpty() {
		return nil, nil
	}
	stated, err := j.state(w, res)
	if err != nil {
		return nil, err
	}
	out := map[string]Provenance{}
	for id, s := range stated {
		data, err := s.content(ctx)
		if err != nil {
			return nil, err
		}
		if res.Refs == nil {
			id = ""
		}
		out[id] = Provenance{s.attestation(w).InToto.PredicateType, data}
	}
	return out, nil
}

// statedProvenance is the provenance of one platform's result, but for what is
// known only when its image is.
type statedProvenance struct {
	j         *job
	ref       *reference
	version   types.ProvenanceSLSA
	max       bool
	predicate *types.ProvenancePredicateSLSA1
	steps     map[string]int // of the vertices in the definition
}

// state works out the provenance of each platform that has a result.
func (j *job) state(w *provenanceWish, res *gwclient.Result) (map[string]*statedProvenance, error) {
	ps, err := exptypes.ParsePlatforms(res.Metadata)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	out := map[string]*statedProvenance{}
	for _, p := range ps.Platforms {
		r, ok := res.FindRef(p.ID)
		if !ok {
			return nil, fmt.Errorf("provenance: no result for platform %s: %w", p.ID, errdefs.ErrInvalidArgument)
		}
		ref, ok := r.(*reference)
		if !ok || ref == nil {
			continue // an empty tree comes from nowhere
		}
		key := p.ID
		if res.Refs == nil {
			key = ""
		}
		s, err := j.stateOne(w, res, ps.Platforms, ref, key)
		if err != nil {
			return nil, fmt.Errorf("provenance of %s: %w", p.ID, err)
		}
		out[p.ID] = s
	}
	return out, nil
}

func (j *job) stateOne(w *provenanceWish, res *gwclient.Result, all []exptypes.Platform, ref *reference, key string) (*statedProvenance, error) {
	c, err := ref.origins(res, all, key)
	if err != nil {
		return nil, err
	}
	p, err := c.predicate(ref.trace.req, ref.trace.root, targetOf(all, key))
	if err != nil {
		return nil, err
	}
	meta := p.RunDetails.Metadata
	if w.complete && !meta.Completeness.ResolvedDependencies {
		return nil, incomplete(c)
	}
	meta.InvocationID, meta.StartedOn, meta.Reproducible = j.invocation.id, &j.invocation.began, w.reproducible
	p.RunDetails.Builder.ID = w.builder
	p.BuildDefinition.InternalParameters.ProvenanceCustomEnv = j.b.ProvenanceEnv
	s := &statedProvenance{j: j, ref: ref, version: w.version, max: w.max, predicate: p}
	if !w.max {
		if withhold(&p.BuildDefinition.ExternalParameters.Request) {
			meta.Completeness.Request = false
		}
		return s, nil
	}
	s.steps, err = describe(p, ref.def)
	return s, err
}

// targetOf is the platform that a result is for; "" if nobody says.
func targetOf(all []exptypes.Platform, key string) string {
	for _, p := range all {
		if p.ID == key || key == "" && len(all) == 1 {
			return platforms.FormatAll(p.Platform)
		}
	}
	return ""
}

// incomplete refuses provenance that does not name every source.
func incomplete(c *capture) error {
	text := "not all sources of the build are known"
	var details []*bkerrdefs.ProvenanceMaterialIncomplete
	for _, l := range c.sources.Local {
		text += fmt.Sprintf("; local directory %q", l.Name)
		details = append(details, &bkerrdefs.ProvenanceMaterialIncomplete{Name: l.Name, Reason: "local_source"})
	}
	return bkerrdefs.WithProvenanceMaterialsIncomplete(fmt.Errorf("complete materials: %s: %w", text, errdefs.ErrFailedPrecondition), details)
}

// origins is what a result is made from, with what its frontend looked into to
// find out what to make: the Dockerfile, the ignore file. What it made for
// other platforms is left out.
func (r *reference) origins(res *gwclient.Result, all []exptypes.Platform, key string) (*capture, error) {
	c := r.captured()
	visited := map[*reference]bool{r: true}
	for _, ref := range referencesOf(res) {
		visited[ref] = true
	}
	refs, images, lost := r.trace.all()
	c.incomplete = c.incomplete || lost
	for _, ref := range refs {
		if visited[ref] {
			continue
		}
		visited[ref] = true
		c.merge(ref.captured())
	}
	if key != "" {
		images = imagesFor(images, all, key)
	}
	for _, img := range images {
		c.addImage(img)
	}
	if err := c.dropPinned(); err != nil {
		return nil, err
	}
	c.sort()
	return c, nil
}

// imagesFor leaves out images that were looked up for other platforms. One that
// was not looked up for every platform is no matter of platforms: the
// frontend's own, or that of a stage which runs on this host.
func imagesFor(images []types.ImageSource, all []exptypes.Platform, key string) (out []types.ImageSource) {
	var current ocispec.Platform
	for _, p := range all {
		if p.ID == key {
			current = p.Platform
		}
	}
	byRef := map[string][]*ocispec.Platform{}
	for _, img := range images {
		if img.Platform != nil {
			byRef[img.Ref] = append(byRef[img.Ref], img.Platform)
		}
	}
	everywhere := map[string]bool{}
	for ref, has := range byRef {
		everywhere[ref] = !slices.ContainsFunc(all, func(p exptypes.Platform) bool {
			m := platforms.NewMatcher(p.Platform)
			return !slices.ContainsFunc(has, func(h *ocispec.Platform) bool { return m.Match(*h) })
		})
	}
	for _, img := range images {
		if p := img.Platform; p == nil || !everywhere[img.Ref] || p.OS == current.OS && p.Architecture == current.Architecture {
			out = append(out, img)
		}
	}
	return out
}

func (s *statedProvenance) attestation(w *provenanceWish) gwclient.Attestation {
	kind := slsa1.PredicateSLSAProvenance
	if s.version == types.ProvenanceSLSA02 {
		kind = slsa02.PredicateSLSAProvenance
	}
	return gwclient.Attestation{
		Kind: gwpb.AttestationKind_InToto,
		Metadata: map[string][]byte{
			solverresult.AttestationReasonKey:     []byte(solverresult.AttestationReasonProvenance),
			solverresult.AttestationInlineOnlyKey: []byte(strconv.FormatBool(w.inline)),
		},
		InToto: solverresult.InTotoAttestation{PredicateType: kind},
		Path:   w.filename, ContentFunc: s.content,
	}
}

// content is the predicate as each exporter writes it: the layers are those of
// its image. Exporters run beside each other.
func (s *statedProvenance) content(ctx context.Context) ([]byte, error) {
	p, meta := *s.predicate, *s.predicate.RunDetails.Metadata
	p.RunDetails.Metadata = &meta
	end := s.j.invocation.end()
	meta.FinishedOn = &end
	if s.max {
		layers, err := s.layers(ctx)
		if err != nil {
			return nil, err
		}
		meta.BuildKitMetadata.Layers = layers
	}
	var v any = &p
	if s.version == types.ProvenanceSLSA02 {
		v = p.ConvertToSLSA02()
	}
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("provenance: %w: %w", err, errdefs.ErrInternal)
	}
	return data, nil
}
