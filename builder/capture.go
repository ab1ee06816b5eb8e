package builder

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	distref "github.com/distribution/reference"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	"github.com/moby/buildkit/solver/llbsolver/provenance/types"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/urlutil"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"varve.dev/errdefs"
)

// capture is what a result was made from. Each thing is in it once.
type capture struct {
	sources    types.Sources
	secrets    []*types.Secret
	ssh        []*types.SSH
	network    bool // steps could reach one
	incomplete bool // there is more that nobody knows
	known      map[string]int
}

// witness is an origin that can tell what it brought; it is asked when it has
// been identified. An origin that is none makes a capture incomplete.
type witness interface {
	witness(c *capture)
}

// captured tells what a reference is made from, as far as it was solved: what
// is not solved had no sources yet.
func (r *reference) captured() *capture {
	c := &capture{}
	if !r.solved() {
		return c
	}
	seen := map[digest.Digest]bool{}
	var walk func(d digest.Digest)
	walk = func(d digest.Digest) {
		if seen[d] {
			return
		}
		seen[d] = true
		v := r.graph.vertices[d]
		c.vertex(r.j, v)
		for _, e := range v.inputs {
			walk(e.vertex)
		}
	}
	walk(r.graph.root.vertex)
	return c
}

// solved tells whether the result is there.
func (r *reference) solved() bool {
	r.j.mu.Lock()
	defer r.j.mu.Unlock()
	res, ok := r.j.memo[r.graph.root.vertex]
	return ok && res.err == nil
}

func (c *capture) vertex(j *job, v *vertex) {
	if exec := v.op.GetExec(); exec != nil {
		c.exec(exec)
		return
	}
	if v.op.GetSource() == nil {
		return
	}
	j.mu.Lock()
	s := j.sources[v.digest]
	j.mu.Unlock()
	if s == nil {
		c.incomplete = true
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	w, ok := s.origin.(witness)
	if !ok || s.key == "" {
		c.incomplete = true
		return
	}
	w.witness(c)
}

func (c *capture) exec(op *pb.ExecOp) {
	for _, m := range op.Mounts {
		switch m.MountType {
		case pb.MountType_SECRET:
			c.addSecret(m.SecretOpt.GetID(), m.SecretOpt.GetOptional())
		case pb.MountType_SSH:
			c.addSSH(m.SSHOpt.GetID(), m.SSHOpt.GetOptional())
		}
	}
	for _, e := range op.Secretenv {
		c.addSecret(e.GetID(), e.GetOptional())
	}
	if op.Network != pb.NetMode_NONE {
		c.network = true
	}
}

// witness tells of an image by the name that the definition has for it.
func (o *imageOrigin) witness(c *capture) {
	p := o.j.platformOf(o.v)
	d, _, err := o.j.resolve(context.Background(), o.ref, p, o.attrs[pb.AttrImageResolveMode]) // known by now
	c.incomplete = c.incomplete || err != nil
	c.addImage(types.ImageSource{Ref: o.ref, Platform: &p, Digest: d})
}

func (o *localOrigin) witness(c *capture) {
	c.addLocal(o.name)
}

func (o *httpOrigin) witness(c *capture) {
	d := o.checksum
	if d == "" && o.got != nil {
		d = o.got.Digest
	}
	c.addHTTP(types.HTTPSource{URL: o.url, Digest: d})
}

func (o *gitOrigin) witness(c *capture) {
	url := o.remote
	if o.ref != "" {
		url += "#" + o.ref
	}
	g := types.GitSource{URL: url}
	if o.at != nil {
		g.Commit = o.at.id
	}
	c.addGit(g)
	for _, id := range []string{o.token, o.header} {
		if id != "" {
			c.addSecret(id, true)
		}
	}
	if o.agent != "" {
		c.addSSH(o.agent, true)
	}
}

func (o *layoutOrigin) witness(c *capture) {
	c.addImage(types.ImageSource{Ref: o.ref, Platform: &o.platform, Digest: o.digest, Local: true})
}

// once tells whether something is new, and where in its list it is.
func (c *capture) once(kind, id string, next int) (at int, fresh bool) {
	if c.known == nil {
		c.known = map[string]int{}
	}
	key := kind + " " + id
	if at, ok := c.known[key]; ok {
		return at, false
	}
	c.known[key] = next
	return next, true
}

// addImage: features of an operating system do not tell images of one index
// apart.
func (c *capture) addImage(i types.ImageSource) {
	id := fmt.Sprintf("%s %v", i.Ref, i.Local)
	if p := i.Platform; p != nil {
		id += fmt.Sprintf(" %s/%s/%s %s", p.OS, p.Architecture, p.Variant, p.OSVersion)
	}
	if _, fresh := c.once("image", id, 0); fresh {
		c.sources.Images = append(c.sources.Images, i)
	}
}

func (c *capture) addImageBlob(b types.ImageBlobSource) {
	if _, fresh := c.once("blob", fmt.Sprintf("%s %v", b.Ref, b.Local), 0); fresh {
		c.sources.ImageBlobs = append(c.sources.ImageBlobs, b)
	}
}

func (c *capture) addLocal(name string) {
	if _, fresh := c.once("local", name, 0); fresh {
		c.sources.Local = append(c.sources.Local, types.LocalSource{Name: name})
	}
}

// addGit takes a repository, its URL with "#" and the ref that was asked for.
// The same one out of a bundle is another.
func (c *capture) addGit(g types.GitSource) {
	g.URL = urlutil.RedactCredentials(g.URL)
	id := g.URL
	if g.Bundle != nil {
		id += " " + g.Bundle.URL
	}
	if _, fresh := c.once("git", id, 0); fresh {
		c.sources.Git = append(c.sources.Git, g)
	}
}

func (c *capture) addHTTP(h types.HTTPSource) {
	h.URL = urlutil.RedactCredentials(h.URL)
	if _, fresh := c.once("http", h.URL, 0); fresh {
		c.sources.HTTP = append(c.sources.HTTP, h)
	}
}

// addSecret: one that has to be there somewhere has to be there.
func (c *capture) addSecret(id string, optional bool) {
	at, fresh := c.once("secret", id, len(c.secrets))
	if fresh {
		c.secrets = append(c.secrets, &types.Secret{ID: id, Optional: optional})
	}
	c.secrets[at].Optional = c.secrets[at].Optional && optional
}

func (c *capture) addSSH(id string, optional bool) {
	id = cmp.Or(id, "default")
	at, fresh := c.once("ssh", id, len(c.ssh))
	if fresh {
		c.ssh = append(c.ssh, &types.SSH{ID: id, Optional: optional})
	}
	c.ssh[at].Optional = c.ssh[at].Optional && optional
}

// merge adds what another result was made from.
func (c *capture) merge(other *capture) {
	for _, i := range other.sources.Images {
		c.addImage(i)
	}
	for _, b := range other.sources.ImageBlobs {
		c.addImageBlob(b)
	}
	for _, l := range other.sources.Local {
		c.addLocal(l.Name)
	}
	for _, g := range other.sources.Git {
		c.addGit(g)
	}
	for _, h := range other.sources.HTTP {
		c.addHTTP(h)
	}
	for _, s := range other.secrets {
		c.addSecret(s.ID, s.Optional)
	}
	for _, s := range other.ssh {
		c.addSSH(s.ID, s.Optional)
	}
	c.network = c.network || other.network
	c.incomplete = c.incomplete || other.incomplete
}

// sort gives the same capture the same order, whatever was solved first. What
// was added since belongs behind it: it ends the use of known.
func (c *capture) sort() {
	slices.SortStableFunc(c.sources.Images, func(a, b types.ImageSource) int { return cmp.Compare(a.Ref, b.Ref) })
	slices.SortStableFunc(c.sources.ImageBlobs, func(a, b types.ImageBlobSource) int { return cmp.Compare(a.Ref, b.Ref) })
	slices.SortStableFunc(c.sources.Local, func(a, b types.LocalSource) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortStableFunc(c.sources.Git, func(a, b types.GitSource) int { return cmp.Compare(a.URL, b.URL) })
	slices.SortStableFunc(c.sources.HTTP, func(a, b types.HTTPSource) int { return cmp.Compare(a.URL, b.URL) })
	slices.SortStableFunc(c.secrets, func(a, b *types.Secret) int { return cmp.Compare(a.ID, b.ID) })
	slices.SortStableFunc(c.ssh, func(a, b *types.SSH) int { return cmp.Compare(a.ID, b.ID) })
}

// dropPinned leaves out images by digest that are there by tag: a frontend looks
// the tag up, and builds on the digest that this comes to.
func (c *capture) dropPinned() error {
	tagged := map[string]bool{}
	pinned := make([]string, len(c.sources.Images)) // the tag of one by digest, or ""
	for i, img := range c.sources.Images {
		named, err := distref.ParseNormalizedNamed(img.Ref)
		if err != nil {
			return fmt.Errorf("source image %q: %w: %w", img.Ref, err, errdefs.ErrInvalidArgument)
		}
		name := named.Name() + ":latest"
		if t, ok := named.(distref.Tagged); ok {
			name = named.Name() + ":" + t.Tag()
		}
		if _, ok := named.(distref.Canonical); ok {
			pinned[i] = name
		} else {
			tagged[name] = true
		}
	}
	kept := c.sources.Images[:0]
	for i, img := range c.sources.Images {
		if pinned[i] == "" || !tagged[pinned[i]] {
			kept = append(kept, img)
		}
	}
	c.sources.Images = kept
	return nil
}

// imageOf is an image that was looked up, in provenance's terms.
func imageOf(m *sourceresolver.MetaResponse, opt sourceresolver.Opt) (img types.ImageSource, ok bool) {
	if m == nil || m.Image == nil || m.Op == nil {
		return img, false
	}
	ref, ok := cutScheme(m.Op.Identifier, schemeImage)
	if !ok {
		ref = strings.TrimPrefix(m.Op.Identifier, schemeOCILayout)
	}
	var p *ocispec.Platform
	if opt.ImageOpt != nil {
		p = opt.ImageOpt.Platform
	}
	if p == nil && opt.OCILayoutOpt != nil {
		p = opt.OCILayoutOpt.Platform
	}
	return types.ImageSource{Ref: ref, Platform: p, Digest: m.Image.Digest, Local: !ok}, true
}
