package builder

import (
	"errors"
	"maps"
	"slices"
	"testing"

	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/solver/llbsolver/provenance/types"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
)

// traced is a build that solves nothing: its references are made by hand.
func traced(b *Builder, req Request) (*job, *gateway) {
	j := &job{
		b: b, req: req, invocation: newInvocation(), memo: map[digest.Digest]result{}, sources: map[digest.Digest]*source{},
	}
	return j, &gateway{j: j, trace: j.newTrace()}
}

func tracer() *Builder { return &Builder{producers: newProducers()} }

// called is a frontend of the build that comes to st.
func called(t *testing.T, g *gateway, opts map[string]string, inputs map[string]*pb.Definition, st llb.State) *reference {
	t.Helper()
	def, err := st.Marshal(t.Context(), llb.LinuxAmd64)
	if err != nil {
		t.Fatal(err)
	}
	below := g.trace.call(frontendDockerfile, opts, inputs)
	res, err := (&gateway{j: g.j, trace: below}).Solve(t.Context(), gwclient.SolveRequest{Definition: def.ToPB()})
	if err != nil {
		t.Fatal(err)
	}
	g.trace.came(below, res)
	ref := res.Ref.(*reference)
	ref.j.memo[ref.graph.root.vertex] = result{}
	return ref
}

func scratchWith(name string) llb.State { return llb.Scratch().File(llb.Mkfile(name, 0o600, nil)) }

func TestInputIsToldByWhoMadeIt(t *testing.T) {
	b := tracer()
	other, g := traced(b, Request{})
	made := called(t, g, map[string]string{"target": "base"}, nil, scratchWith("/base"))
	inputs := map[string]*pb.Definition{"base": made.def, "plain": definition(t, scratchWith("/plain"))}

	_, g = traced(b, Request{})
	user := called(t, g, nil, inputs, scratchWith("/user"))
	if got := user.trace.req.inputs; len(got) != 1 || got["base"].Request.Args["target"] != "base" {
		t.Errorf("inputs: %v", got)
	}
	// The same result of another request: nobody can tell which it was.
	called(t, g, map[string]string{"target": "twin"}, nil, scratchWith("/base"))
	if in, ok := b.producers.find(made.def); ok {
		t.Errorf("a result of two requests is said to be of %v", in)
	}
	b.producers.drop(g.j)
	if _, ok := b.producers.find(made.def); !ok {
		t.Error("a result is forgotten with a build that did not make it")
	}
	b.producers.drop(other)
	if len(b.producers.refs) != 0 {
		t.Errorf("left after the builds: %v", b.producers.refs)
	}
}

// A frontend may return what it was handed: it is not its own maker.
func TestInputThatIsTheResult(t *testing.T) {
	_, g := traced(tracer(), Request{})
	first := called(t, g, map[string]string{"n": "1"}, nil, scratchWith("/x"))
	again := called(t, g, map[string]string{"n": "2"}, map[string]*pb.Definition{"in": first.def}, scratchWith("/x"))
	if got := again.trace.req.inputs["in"].Request; got.Args["n"] != "1" || len(got.Inputs) != 0 {
		t.Errorf("input: %+v", got)
	}
}

// Each call takes the one before twice, so that its whole story doubles.
func TestStoriesAreBounded(t *testing.T) {
	_, g := traced(tracer(), Request{})
	ref := called(t, g, nil, nil, scratchWith("/0"))
	for range 20 {
		st, err := ref.ToState()
		if err != nil {
			t.Fatal(err)
		}
		ref = called(t, g, nil, map[string]*pb.Definition{"a": ref.def, "b": ref.def}, st.File(llb.Mkfile("/n", 0o600, nil)))
	}
	if n := countRequests(ref.trace.req.tell(types.Sources{})); n > maxRequests {
		t.Errorf("%d requests", n)
	}
	c := &capture{}
	p, err := c.predicate(ref.trace.req, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	if ref.trace.req.partial && p.RunDetails.Metadata.Completeness.Request {
		t.Error("a request without some of its inputs is said to be complete")
	}
}

func definition(t *testing.T, st llb.State) *pb.Definition {
	t.Helper()
	def, err := st.Marshal(t.Context(), llb.LinuxAmd64)
	if err != nil {
		t.Fatal(err)
	}
	return def.ToPB()
}

func TestTooMuchToRemember(t *testing.T) {
	j, g := traced(tracer(), Request{})
	j.invocation.traced.Store(maxTraced)
	res, err := g.Solve(t.Context(), gwclient.SolveRequest{Definition: definition(t, scratchWith("/x"))})
	if err != nil {
		t.Fatal(err)
	}
	c, err := res.Ref.(*reference).origins(res, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	if !c.incomplete || len(g.trace.refs) != 0 {
		t.Errorf("incomplete %v, %d references kept", c.incomplete, len(g.trace.refs))
	}
}

// The client's request is told beside the frontend's where they differ.
func TestRootRequest(t *testing.T) {
	for name, c := range map[string]struct {
		attrs map[string]string
		told  bool
	}{
		"none":      {nil, false},
		"wish only": {map[string]string{"attest:provenance": ""}, false},
		"options":   {map[string]string{"a": "b"}, true},
	} {
		_, g := traced(tracer(), Request{Attrs: c.attrs})
		ref := called(t, g, nil, nil, scratchWith("/x"))
		p, err := (&capture{}).predicate(ref.trace.req, ref.trace.root, "")
		if err != nil {
			t.Fatal(err)
		}
		if root := p.BuildDefinition.ExternalParameters.Request.Root; (root != nil) != c.told {
			t.Errorf("%s: root %+v", name, root)
		}
	}
	// A build that is one call of a frontend says it once.
	req := Request{Frontend: frontendDockerfile, Attrs: map[string]string{"a": "b"}}
	_, g := traced(tracer(), req)
	ref := called(t, g, req.Attrs, nil, scratchWith("/x"))
	p, err := (&capture{}).predicate(ref.trace.req, ref.trace.root, "")
	if err != nil {
		t.Fatal(err)
	}
	if p.BuildDefinition.ExternalParameters.Request.Root != nil {
		t.Error("a request is told twice")
	}
}

func TestCaptureHasThingsOnce(t *testing.T) {
	amd, arm := &ocispec.Platform{OS: "linux", Architecture: "amd64"}, &ocispec.Platform{OS: "linux", Architecture: "arm64"}
	one, two := &capture{}, &capture{}
	one.addImage(types.ImageSource{Ref: "docker.io/library/b:1@sha256:" + digest.FromString("b").Encoded(), Platform: amd})
	two.addImage(types.ImageSource{Ref: "docker.io/library/b:1", Platform: arm})
	two.addImage(types.ImageSource{Ref: "docker.io/library/a:1", Platform: amd})
	two.addImage(types.ImageSource{Ref: "docker.io/library/a:1", Platform: &ocispec.Platform{OS: "linux", Architecture: "amd64"}})
	one.addSecret("s", true)
	two.addSecret("s", false)
	one.addSSH("", true)
	two.addSSH("default", true)
	one.addHTTP(types.HTTPSource{URL: "https://me:secret@example.com/x"})
	two.addHTTP(types.HTTPSource{URL: "https://xxxxx:xxxxx@example.com/x"})
	one.addGit(types.GitSource{URL: "https://example.com/r.git#v1"})
	two.addGit(types.GitSource{URL: "https://example.com/r.git#v1", Bundle: &types.GitBundle{URL: "x"}})
	one.merge(two)
	if err := one.dropPinned(); err != nil {
		t.Fatal(err)
	}
	one.sort()
	var refs []string
	for _, i := range one.sources.Images {
		refs = append(refs, i.Ref)
	}
	if want := []string{"docker.io/library/a:1", "docker.io/library/b:1"}; !slices.Equal(refs, want) {
		t.Errorf("images %q, not %q", refs, want)
	}
	if len(one.secrets) != 1 || one.secrets[0].Optional {
		t.Errorf("secrets %v: what one step needs is not optional", one.secrets)
	}
	if len(one.ssh) != 1 || len(one.sources.HTTP) != 1 || len(one.sources.Git) != 2 {
		t.Errorf("ssh %v, http %v, git %v", one.ssh, one.sources.HTTP, one.sources.Git)
	}
}

func TestImagesForPlatform(t *testing.T) {
	amd, arm := ocispec.Platform{OS: "linux", Architecture: "amd64"}, ocispec.Platform{OS: "linux", Architecture: "arm64"}
	all := []exptypes.Platform{{ID: "linux/amd64", Platform: amd}, {ID: "linux/arm64", Platform: arm}}
	images := []types.ImageSource{
		{Ref: "base", Platform: &amd}, {Ref: "base", Platform: &arm},
		{Ref: "tools", Platform: &amd}, // a stage of the build's platform
		{Ref: "frontend"},
	}
	var got []string
	for _, i := range imagesFor(images, all, "linux/arm64") {
		name := i.Ref
		if i.Platform != nil {
			name += " " + i.Platform.Architecture
		}
		got = append(got, name)
	}
	if want := []string{"base arm64", "tools amd64", "frontend"}; !slices.Equal(got, want) {
		t.Errorf("%q, not %q", got, want)
	}
}

func TestRequestIsTold(t *testing.T) {
	sources := types.Sources{
		Git:  []types.GitSource{{URL: "https://xxxxx:xxxxx@example.com/r.git#v1", Commit: "0123456789012345678901234567890123456789"}},
		HTTP: []types.HTTPSource{{URL: "https://example.com/Dockerfile", Digest: digest.FromString("x")}},
	}
	for name, c := range map[string]struct {
		opts              map[string]string
		uri, path, hash   string
		args              []string
		argument, meaning string
	}{
		"git":     {opts: map[string]string{"context": "https://u:p@example.com/r.git#v1:src", "filename": "D"}, uri: "https://xxxxx:xxxxx@example.com/r.git#v1:src", path: "D", hash: "sha1"},
		"http":    {opts: map[string]string{"contextkey": "where", "where": "https://example.com/Dockerfile"}, uri: "https://example.com/Dockerfile", hash: "sha256", args: []string{"contextkey"}},
		"unknown": {opts: map[string]string{"context": "elsewhere"}, uri: "elsewhere"},
		"host":    {opts: map[string]string{"platform": "linux/arm64", "cgroup-parent": "x", "attest:sbom": ""}},
		"named":   {opts: map[string]string{"context:a": "https://u:p@example.com/"}, args: []string{"context:a"}, argument: "context:a", meaning: "https://xxxxx:xxxxx@example.com/"},
		"vcs":     {opts: map[string]string{"vcs:source": "https://u:p@example.com/"}, args: []string{"vcs:source"}, argument: "vcs:source", meaning: "https://xxxxx:xxxxx@example.com/"},
	} {
		told := (&request{args: tellable(c.opts)}).tell(sources)
		if s := told.ConfigSource; s.URI != c.uri || s.Path != c.path || c.hash != "" && s.Digest[c.hash] == "" {
			t.Errorf("%s: config source %+v", name, s)
		}
		if got := slices.Sorted(maps.Keys(told.Request.Args)); !slices.Equal(got, c.args) || told.Request.Args[c.argument] != c.meaning {
			t.Errorf("%s: args %v", name, told.Request.Args)
		}
	}
}

func TestMinWithholds(t *testing.T) {
	args := func() map[string]string { return map[string]string{"target": "x", "build-arg:PW": "x", "label:l": "x"} }
	shared := &types.RequestProvenance{Request: &types.Parameters{Args: args(), Secrets: []*types.Secret{{ID: "s"}}}}
	p, err := (&capture{secrets: []*types.Secret{{ID: "s"}}}).predicate(
		&request{frontend: "f", args: map[string]string{"target": "x"}, inputs: map[string]*types.RequestProvenance{"in": shared}}, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	req := &p.BuildDefinition.ExternalParameters.Request
	if !withhold(req) {
		t.Error("what was withheld of an input makes nothing incomplete")
	}
	in := req.Inputs["in"].Request
	if len(req.Secrets)+len(in.Secrets) > 0 || len(in.Args) != 1 || in.Args["target"] != "x" {
		t.Errorf("left: %+v, %+v", req, in)
	}
	if len(shared.Request.Args) != 3 {
		t.Error("one predicate's withholding changed what others tell")
	}
}

func TestStepsOfDefinition(t *testing.T) {
	text := llb.NewSourceMap(nil, "Dockerfile", "Dockerfile", []byte("FROM x"))
	st := llb.Local("context", llb.SessionID("one"), llb.LocalUniqueID("two")).
		File(llb.Mkfile("/a", 0o600, nil), text.Location([]*pb.Range{{Start: &pb.Position{Line: 1}, End: &pb.Position{Line: 1}}}))
	def := definition(t, st)
	var p types.ProvenancePredicateSLSA1
	p.RunDetails.Metadata = &types.ProvenanceMetadataSLSA1{}
	numbers, err := describe(&p, def)
	if err != nil {
		t.Fatal(err)
	}
	config := p.BuildDefinition.InternalParameters.BuildConfig
	if len(config.Definition) != 3 || len(numbers) != 3 || len(config.DigestMapping) != 3 {
		t.Fatalf("%d steps, %d numbers: %+v", len(config.Definition), len(numbers), config)
	}
	if attrs := config.Definition[0].Op.GetSource().Attrs; attrs[pb.AttrLocalSessionID]+attrs[pb.AttrLocalUniqueID] != "" {
		t.Errorf("what is other in each build is told: %v", attrs)
	}
	for i, want := range [][]string{{}, {"step0:0"}, {"step1:0"}} {
		if s := config.Definition[i]; s.ID != stepName(i) || !slices.Equal(s.Inputs, want) || len(s.Op.Inputs) > 0 {
			t.Errorf("step %d: %+v", i, s)
		}
	}
	src := p.RunDetails.Metadata.BuildKitMetadata.Source
	if len(src.Infos) != 1 || src.Infos[0].Filename != "Dockerfile" || len(src.Locations["step1"].GetLocations()) != 1 {
		t.Errorf("source: %+v", src)
	}
}

func TestWishes(t *testing.T) {
	w, err := wishesOf(map[string]string{"attest:provenance": "mode=min,version=v0.2,reproducible=true", "no-cache": "", "attest:sbom": "generator=scan,A=b"})
	if err != nil {
		t.Fatal(err)
	}
	if p := w.provenance; p.max || !p.reproducible || p.version != types.ProvenanceSLSA02 || p.filename != provenanceFile {
		t.Errorf("provenance: %+v", p)
	}
	if s := w.sbom; s.generator != "docker.io/library/scan:latest" || s.params["A"] != "b" || len(s.params) != 1 || !s.anew {
		t.Errorf("sbom: %+v", s)
	}
	if w, err = wishesOf(map[string]string{"a": "b"}); err != nil || w.sbom != nil || w.provenance != nil {
		t.Errorf("nothing asked for: %+v, %v", w, err)
	}
	for _, bad := range []map[string]string{
		{"attest:other": ""}, {"attest:provenance": "mode=some"}, {"attest:provenance": "version=v9"},
		{"attest:provenance": "reproducible=maybe"}, {"attest:sbom": "generator="}, {"attest:sbom": "generator=A B"},
	} {
		if _, err := wishesOf(bad); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

func TestAsWritten(t *testing.T) {
	asked := Request{Frontend: frontendGateway, Attrs: map[string]string{keySource: frontendDockerfile, "a": "b"}}
	got := asWritten(asked)
	if got.Frontend != frontendDockerfile || len(got.Attrs) != 1 || len(asked.Attrs) != 2 {
		t.Errorf("%+v of %+v", got, asked)
	}
	asked.Attrs["context:dockerfile.v0"] = "docker-image://mine"
	if got := asWritten(asked); got.Frontend != frontendGateway {
		t.Errorf("the client's own frontend is passed over: %+v", got)
	}
}

func TestMaterials(t *testing.T) {
	d := digest.FromString("x")
	got, err := materials(types.Sources{
		Images: []types.ImageSource{
			{Ref: "docker.io/library/busybox:latest", Platform: &ocispec.Platform{OS: "linux", Architecture: "amd64"}, Digest: d},
			{Ref: "docker.io/library/foo@" + d.String(), Digest: d, Local: true},
		},
		Git:  []types.GitSource{{URL: "u#r", Commit: "c", Bundle: &types.GitBundle{URL: "docker-image+blob://example.com/r@" + d.String()}}},
		HTTP: []types.HTTPSource{{URL: "https://example.com", Digest: d}},
	})
	if err != nil {
		t.Fatal(err)
	}
	var uris []string
	for _, m := range got {
		uris = append(uris, m.URI)
	}
	want := []string{
		"pkg:docker/busybox@latest?platform=linux%2Famd64", "pkg:oci/foo?digest=sha256:" + d.Encoded(), "u#r",
		"pkg:docker/example.com/r@latest?ref_type=bundle&vcs_url=u%23r", "https://example.com",
	}
	if !slices.Equal(uris, want) {
		t.Errorf("\n%q, not\n%q", uris, want)
	}
}
