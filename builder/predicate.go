package builder

import (
	"fmt"
	"maps"
	"strings"

	"github.com/containerd/platforms"
	slsacommon "github.com/in-toto/in-toto-golang/in_toto/slsa_provenance/common"
	slsa1 "github.com/in-toto/in-toto-golang/in_toto/slsa_provenance/v1"
	"github.com/moby/buildkit/frontend/dockerfile/dfgitutil"
	dockerfileversion "github.com/moby/buildkit/frontend/dockerfile/version"
	"github.com/moby/buildkit/solver/llbsolver/compat"
	"github.com/moby/buildkit/solver/llbsolver/provenance/types"
	"github.com/moby/buildkit/util/purl"
	"github.com/moby/buildkit/util/urlutil"
	"github.com/opencontainers/go-digest"
	"github.com/package-url/packageurl-go"

	"varve.dev/errdefs"
)

// Options of frontends that provenance knows.
const (
	optContext    = "context"
	optContextKey = "contextkey"
	optFilename   = "filename"
	optVCS        = "vcs:"
)

// untold are options that tell of this host, not of what is built.
var untold = map[string]bool{"cgroup-parent": true, "image-resolve-mode": true, "platform": true, "cache-imports": true}

// tellable are a frontend's options without those, without the wish for
// attestations, and without passwords in URLs.
func tellable(opts map[string]string) map[string]string {
	where := optContext
	if v := opts[optContextKey]; v != "" {
		where = v
	}
	out := map[string]string{}
	for k, v := range opts {
		if untold[k] || strings.HasPrefix(k, "attest:") {
			continue
		}
		if k == where || k == optVCS+"source" || strings.HasPrefix(k, optContext+":") {
			v = urlutil.RedactCredentials(v)
		}
		out[k] = v
	}
	return out
}

// tell describes a call with the place of its Dockerfile apart from the other
// options. What came from there is looked up in sources.
func (r *request) tell(sources types.Sources) *types.RequestProvenance {
	args := maps.Clone(r.args)
	where := optContext
	if v := args[optContextKey]; v != "" {
		where = v
	} else if args["input:context"] != "" {
		where = "input:context"
	}
	out := &types.RequestProvenance{Request: &types.Parameters{Frontend: r.frontend, Inputs: r.inputs}}
	if v := args[where]; v != "" {
		out.ConfigSource.URI, out.ConfigSource.Digest = locate(sources, v)
		out.ConfigSource.URI = urlutil.RedactCredentials(out.ConfigSource.URI)
		delete(args, where)
	}
	if v := args[optFilename]; v != "" {
		out.ConfigSource.Path = v
		delete(args, optFilename)
	}
	if len(args) > 0 {
		out.Request.Args = args
	}
	return out
}

// locate finds the source that a build context was; a name that is none stays
// as it is.
func locate(sources types.Sources, uri string) (string, slsacommon.DigestSet) {
	full, plain := uri, uri
	if formatted, ok := dfgitutil.FragmentFormat(uri, true); ok {
		full = formatted
		plain, _ = dfgitutil.FragmentFormat(uri, false)
	}
	for _, g := range sources.Git {
		if g.URL == plain {
			return full, commitSet(g.Commit)
		}
	}
	for _, h := range sources.HTTP {
		if h.URL == plain {
			return h.URL, digestSet(h.Digest)
		}
	}
	return uri, nil
}

func commitSet(commit string) slsacommon.DigestSet {
	if len(commit) == 64 {
		return slsacommon.DigestSet{"sha256": commit}
	}
	return slsacommon.DigestSet{"sha1": commit}
}

func digestSet(d digest.Digest) slsacommon.DigestSet {
	if d == "" {
		return nil
	}
	return slsacommon.DigestSet{d.Algorithm().String(): d.Encoded()}
}

// materials are the sources by their URLs: images, blobs of images,
// repositories, files.
func materials(s types.Sources) (out []slsa1.ResourceDescriptor, err error) {
	add := func(uri string, digests slsacommon.DigestSet) {
		out = append(out, slsa1.ResourceDescriptor{URI: uri, Digest: digests})
	}
	for _, i := range s.Images {
		uri, err := purl.RefToPURL(purlType(i.Local), i.Ref, i.Platform)
		if err != nil {
			return nil, fmt.Errorf("source image %q: %w: %w", i.Ref, err, errdefs.ErrInvalidArgument)
		}
		add(uri, digestSet(i.Digest))
	}
	for _, b := range s.ImageBlobs {
		uri, err := blobURL(purlType(b.Local), b.Ref, packageurl.Qualifier{Key: "ref_type", Value: "blob"})
		if err != nil {
			return nil, err
		}
		add(uri, digestSet(b.Digest))
	}
	for _, g := range s.Git {
		add(g.URL, commitSet(g.Commit))
		if g.Bundle == nil {
			continue
		}
		scheme, ref, d, ok := splitLocator(g.Bundle.URL)
		if !ok {
			continue
		}
		uri, err := blobURL(purlType(strings.HasPrefix(scheme, "oci-layout")), ref,
			packageurl.Qualifier{Key: "ref_type", Value: "bundle"}, packageurl.Qualifier{Key: "vcs_url", Value: g.URL})
		if err != nil {
			return nil, err
		}
		add(uri, digestSet(d))
	}
	for _, h := range s.HTTP {
		add(h.URL, digestSet(h.Digest))
	}
	return out, nil
}

// purlType: what is not of a registry has a type of its own.
func purlType(local bool) string {
	if local {
		return packageurl.TypeOCI
	}
	return packageurl.TypeDocker
}

// blobURL is the package URL of a blob in a repository of images.
func blobURL(kind, ref string, qualifiers ...packageurl.Qualifier) (string, error) {
	uri, err := purl.RefToPURL(kind, ref, nil)
	if err != nil {
		return "", fmt.Errorf("source blob %q: %w: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	p, err := packageurl.FromString(uri)
	if err != nil {
		return "", fmt.Errorf("source blob %q: %w: %w", ref, err, errdefs.ErrInternal)
	}
	p.Qualifiers = append(p.Qualifiers, qualifiers...)
	return p.ToString(), nil
}

// splitLocator takes a bundle's place apart: scheme://repository@digest.
func splitLocator(s string) (scheme, ref string, d digest.Digest, ok bool) {
	scheme, rest, ok := strings.Cut(s, "://")
	at := strings.LastIndex(rest, "@")
	if !ok || at <= 0 {
		return "", "", "", false
	}
	d = digest.Digest(rest[at+1:])
	return scheme, rest[:at], d, d.Validate() == nil
}

// predicate states what of a capture and its request does not depend on how
// much is to be told.
func (c *capture) predicate(req, root *request, target string) (*types.ProvenancePredicateSLSA1, error) {
	deps, err := materials(c.sources)
	if err != nil {
		return nil, err
	}
	if req == nil {
		req, root = &request{}, nil
	}
	told := req.tell(c.sources)
	if root != nil {
		// A client that calls no frontend but this one says it once.
		if r := root.tell(c.sources); says(r) && !r.Equal(told) {
			told.Request.Root = r
		}
	}
	p := &types.ProvenancePredicateSLSA1{}
	def, meta := &p.BuildDefinition, &types.ProvenanceMetadataSLSA1{}
	p.RunDetails.Metadata = meta
	def.BuildType, def.ResolvedDependencies = types.BuildKitBuildType1, deps
	def.ExternalParameters.ConfigSource = told.ConfigSource
	// What is shared with other predicates is not to be changed by this one.
	params := told.Request.Clone()
	meta.BuildKitMetadata.VCS = takeVCS(params)
	params.Secrets, params.SSH = c.secrets, c.ssh
	params.CompatibilityVersion = compat.CompatibilityVersionCurrent
	for i := range c.sources.Local {
		params.Locals = append(params.Locals, &c.sources.Local[i])
	}
	def.ExternalParameters.Request = *params
	def.InternalParameters.BuilderPlatform = platforms.Format(platforms.Normalize(platforms.DefaultSpec()))
	def.InternalParameters.TargetPlatform = target
	if params.Frontend == frontendDockerfile {
		def.InternalParameters.DockerfileVersion = dockerfileversion.Version()
	}
	complete := !c.incomplete && len(c.sources.Local) == 0
	meta.Completeness = types.BuildKitComplete{Request: params.Frontend != "" && !req.partial, ResolvedDependencies: complete}
	meta.Hermetic = complete && !c.network
	return p, nil
}

func says(r *types.RequestProvenance) bool {
	return r.Request.Frontend != "" || len(r.Request.Args) > 0 || len(r.Request.Inputs) > 0
}

// takeVCS takes what the client says of its repository out of a request.
func takeVCS(p *types.Parameters) map[string]string {
	out := map[string]string{}
	for k, v := range p.Args {
		name, ok := strings.CutPrefix(k, optVCS)
		if !ok {
			continue
		}
		delete(p.Args, k)
		if v != "" {
			out[name] = v
		}
	}
	if len(out) == 0 {
		return nil
	}
	return out
}

// withhold takes out of a request what may be confidential, and tells whether
// options were among it.
func withhold(p *types.Parameters) (incomplete bool) {
	if p == nil {
		return false
	}
	for k := range p.Args {
		if strings.HasPrefix(k, "build-arg:") || strings.HasPrefix(k, "label:") {
			delete(p.Args, k)
			incomplete = true
		}
	}
	p.Secrets, p.SSH = nil, nil
	below := []*types.RequestProvenance{p.Root}
	for _, in := range p.Inputs {
		below = append(below, in)
	}
	for _, r := range below {
		if r != nil && withhold(r.Request) {
			incomplete = true
		}
	}
	return incomplete
}
